# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# Runs the program on this host: on the RNIC that FARBUS_RDMA_DEV names, or on soft-RoCE of the host's own kernel over a dummy
# network device. Sourced, never run. For example `FARBUS_RDMA_DEV=mlx5_0 ci/softroce target/release/farbus devices` runs here, with no VM.
#
# Expects what ci/softroce has parsed. The program's files are where they are, so --file can only say so.

# The host's soft-RoCE: a network device of our own with an address for documentation (RFC 5737), so that nothing else is touched.
host_netdev=farbus0 host_device=rxe_farbus host_address=192.0.2.129

# Runs "$@" with RDMA device $FARBUS_RDMA_DEV; sets status.
run_on_device() {
    local device=$FARBUS_RDMA_DEV folder pair path
    folder=/sys/class/infiniband/$device
    [[ -d $folder ]] || die "this host has no RDMA device $device, which FARBUS_RDMA_DEV names; it has: $(ls /sys/class/infiniband 2>/dev/null | tr '\n' ' ')"
    grep -qs ACTIVE "$folder"/ports/*/state ||
        die "no port of $device is active: $(cat "$folder"/ports/*/state | tr '\n' ' '); connect it or bring its network device up"
    [[ -z $shell ]] || set -- "${SHELL:-/bin/sh}"
    for pair in "${extra_files[@]}"; do
        [[ -e ${pair%%:*} ]] || die "${pair%%:*}: no such file"
        [[ $(absolute "${pair%%:*}") == "$(absolute "${pair#*:}")" ]] ||
            die "--file $pair: on this host's own device files stay where they are; give it without a second path, or use --guest"
    done
    export FARBUS_LAB_HOST=a
    export FARBUS_LAB_ADDRESS=${FARBUS_LAB_ADDRESS:-$(address_of "$folder")}
    export FARBUS_LAB_PEER=${FARBUS_LAB_PEER:-$FARBUS_LAB_ADDRESS}
    ((${#environment[@]} == 0)) || export "${environment[@]}"
    say "running on this host's $device, $FARBUS_LAB_ADDRESS"
    status=0
    if [[ -n $shell ]]; then
        "$@" >&3 2>&4 || status=$?
    else
        timeout -k 5 "$limit" "$@" </dev/null >&3 2>&4 || status=$?
        # 137 may also be the program's own; after a timeout's SIGKILL it is what timeout says.
        [[ $status != 124 ]] || say "the program was ended after $limit s (--seconds)"
    fi
    for path in "${outs[@]}"; do
        if [[ ! -e $path ]]; then
            say "the program left no $path"
            missing=yes
        elif [[ $path != "$(absolute "$out_dir/${path##*/}")" ]]; then
            mkdir -p "$out_dir"
            cp -r -- "$path" "$out_dir/"
        fi
    done
}

# The first IPv4 address among the GIDs of the device in folder $1, which hold it as ::ffff:a.b.c.d. None is no error: InfiniBand has none.
address_of() {
    local gid
    for gid in "$1"/ports/*/gids/*; do
        gid=$(cat "$gid" 2>/dev/null) || continue
        [[ $gid == 0000:0000:0000:0000:0000:ffff:* ]] || continue
        gid=${gid#*ffff:}
        printf '%d.%d.%d.%d\n' $((16#${gid:0:2})) $((16#${gid:2:2})) $((16#${gid:5:2})) $((16#${gid:7:2}))
        return
    done
}

# True if this host's kernel has rdma_rxe, and we may make devices with it.
host_has_rxe() {
    ((EUID == 0)) || return 1
    [[ -d /sys/module/rdma_rxe ]] || modprobe -q rdma_rxe 2>/dev/null || return 1
    # Without these the lab runs in a guest all the same, but not silently.
    command -v ip >/dev/null && command -v rdma >/dev/null || {
        say "this host's kernel has rdma_rxe, but ip or rdma is missing: apt-get install iproute2; using a guest"
        return 1
    }
}

# Runs "$@" on soft-RoCE of the host's own kernel; sets status. The device stays as long as any run uses it.
run_on_host_rxe() {
    mkdir -p "$(lab_cache)"
    exec {using}>"$(lab_cache)/host-rxe.lock"
    # While a lock is exchanged for another kind, another run may take the device away.
    until flock -s "$using" && [[ -d /sys/class/infiniband/$host_device ]]; do
        flock "$using"
        [[ -d /sys/class/infiniband/$host_device ]] || make_host_rxe
    done
    export FARBUS_RDMA_DEV=$host_device FARBUS_LAB_ADDRESS=$host_address FARBUS_LAB_PEER=$host_address
    run_on_device "$@"
}
make_host_rxe() {
    local tries=0
    modprobe ib_uverbs 2>/dev/null || true
    [[ -d /sys/class/net/$host_netdev ]] || ip link add "$host_netdev" mtu 4200 type dummy || die "this host makes no dummy network device"
    ip link set "$host_netdev" up
    ip addr replace "$host_address/32" dev "$host_netdev"
    rdma link add "$host_device" type rxe netdev "$host_netdev" || die "this host's rdma_rxe makes no device on $host_netdev; dmesg says why, --guest uses a guest"
    until grep -qs ACTIVE "/sys/class/infiniband/$host_device/ports/1/state"; do
        ((tries++ < 100)) || die "$host_device has no active port after 5 s: $(cat "/sys/class/infiniband/$host_device/ports/1/state")"
        sleep 0.05
    done
}
# The last run takes the device away. For the end of the lab, however it comes.
end_host_rxe() {
    [[ -n ${using:-} ]] || return 0
    flock -nx "$using" || return 0
    rdma link delete "$host_device" || true
    ip link delete "$host_netdev" || true
}
