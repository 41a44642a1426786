# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# The virtual machine of the soft-RoCE lab: the one list of QEMU's arguments with which a state is saved and restored.
# Sourced, never run. For example `machine 1 1G` sets `machine_args`, and `boot_args` adds the kernel for the first start.

# Sets machine_args for a guest on a lab of $1 hosts with $2 of memory. What is not here (files, sockets, the memory itself) may
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
}

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
