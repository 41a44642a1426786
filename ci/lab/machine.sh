# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# The virtual machine of the soft-RoCE lab: the one list of QEMU's arguments with which a state is saved and restored.
# Sourced, never run. For example `machine 1 1G` sets `machine_args`, and `boot_args` adds the kernel for the first start.

# Sets machine_args for a guest on a lab of $1 hosts with $2 of memory, and with a virtual IOMMU and four free PCIe root ports if $3 is not
# empty; what sits behind the ports is added when the guest is restored (pci_devices). What is not here (files, sockets, the memory itself) may
# differ between saving and restoring; all that is here is part of the state's key.
machine() {
    # shellcheck disable=SC2054 # the commas are QEMU's
    machine_args=(-nodefaults -no-user-config -no-reboot -display none
        -machine q35,memory-backend=mem -accel tcg,thread=multi -cpu max -smp 2 -m "$2"
        # The state does not hold the memory: that is a file, of which each guest gets private pages.
        -global migration.x-ignore-shared=on
        # After a restart QEMU would announce the card on a link that is not connected yet, and crash (11.1.3).
        -global migration.announce-rounds=0
        # A new generation on each start, or all guests from one state would draw the same random numbers.
        -device vmgenid,id=generation,guid=auto -device virtio-rng-pci
        -serial chardev:console -serial chardev:control
        -device virtio-serial-pci,max_ports=4
        -device virtserialport,nr=1,chardev=out,name=out
        -device virtserialport,nr=2,chardev=err,name=err
        -device virtserialport,nr=3,chardev=files,name=files
        -device virtio-blk-pci,drive=job)
    # Every guest's card has the same address until it is told its role.
    [[ $1 == 1 ]] || machine_args+=(-device virtio-net-pci,netdev=link,mac=52:54:00:00:00:0f,host_mtu=4200,romfile=)
    [[ -z $3 ]] || {
        local port
        # shellcheck disable=SC2054 # the commas are QEMU's
        machine_args+=(-machine kernel-irqchip=split -device intel-iommu,intremap=on,caching-mode=on)
        for port in 1 2 3 4; do
            # Without a power controller: the guest switches an empty slot off, and what is there after all would not answer.
            machine_args+=(-device "pcie-root-port,id=port$port,chassis=$port,addr=1$port.0,hotplug=off,power_controller_present=off,bus-reserve=1,mem-reserve=4M,pref64-reserve=4M")
        done
    }
}

# Sets pci_args: the PCI devices of a guest with --pci, whose disk lies in folder $1. An edu and an NVMe controller each have a root port, and so
# a group, of their own. Behind the third an edu shares a conventional bus, and so a group, with a device that the kernel drives.
pci_devices() {
    truncate -s "$pci_disk_bytes" "$1/pci-disk"
    # shellcheck disable=SC2054 # the commas are QEMU's
    pci_args=(-device edu,bus=port1
        -drive "if=none,id=pci-disk,format=raw,file=$1/pci-disk,cache=unsafe" -device nvme,bus=port2,drive=pci-disk,serial=farbus-lab
        -device pcie-pci-bridge,id=legacy,bus=port3 -device edu,bus=legacy,addr=1 -device virtio-rng-pci,bus=legacy,addr=2)
}
pci_disk_bytes=$((256 << 20))
# Where the guest finds them: a bridge may have two buses behind it.
pci_environment=(FARBUS_LAB_EDU=0000:01:00.0 FARBUS_LAB_NVME=0000:03:00.0 FARBUS_LAB_EDU_SHARED=0000:06:01.0)
# On the kernel's command line: without the first it leaves the virtual IOMMU alone.
pci_words='intel_iommu=on farbus.pci=1'

# The size of the disk that the job comes on. A guest knows a disk's size from its boot, so all have this one; it is a hole.
job_disk_bytes=$((4 << 30))

# Starts QEMU in folder $1 with "${@:2}", in the background, as $qemu. The folder gets the FIFOs control.in and control.out
# (the guest's second serial port), monitor.in and monitor.out (QMP), and qemu.log. QEMU dies with us.
start_qemu() {
    local folder=$1 name
    shift
    for name in control monitor; do
        mkfifo "$folder/$name.in" "$folder/$name.out"
    done
    (
        # A lock that a killed lab held must not live on here.
        [[ -z ${lock:-} ]] || exec {lock}>&-
        exec setpriv --pdeathsig KILL "$FARBUS_QEMU" "${machine_args[@]}" \
            -chardev "pipe,id=control,path=$folder/control" \
            -chardev "pipe,id=monitor,path=$folder/monitor" -object monitor-qmp,id=qmp,chardev=monitor \
            "$@"
    ) </dev/null >"$folder/qemu.log" 2>&1 &
    qemu=$!
}
