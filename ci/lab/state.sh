# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# The saved ready state of the soft-RoCE guest: made once by booting to "ready", then restored by every run. Sourced, never
# run. For example `ready_state bookworm 1 1G ''` boots for 5 s the first time, and sets `state` to a folder with `ram`, the guest's
# memory, and `devices`, all else; restoring takes a tenth of a second, because pages of `ram` are only copied when touched.

# Sets `state` (a folder), and machine_args, for kernel $1, $2 hosts, $3 of memory, $4 on the kernel's command line, and a machine for PCI
# devices if $5 is not empty.
# Expects $work, a folder to be removed at the end. The key has all that the state depends on, so one that is there is right; it appears whole or not at all.
ready_state() {
    local cache key paths lock
    cache=$(lab_cache)
    paths=$("$lab_dir/fetch" "$1") || die "cannot prepare the guest; see the lines above"
    eval "$paths"
    machine "$2" "$3" "${5:-}"
    # The processor too: the guest has measured the time stamp counter of the one that it booted on.
    key=$({
        printf '%s\n' "${machine_args[@]}" "$job_disk_bytes" "$1" "$2" "$3" "$4${5:+ $pci_words}"
        stat -c '%s %Y' "$FARBUS_LAB_ROOT/usr/bin/qemu-system-x86_64" "$FARBUS_LAB_KERNEL" "$FARBUS_LAB_INITRAMFS"
        grep -m1 '^model name' /proc/cpuinfo
        cat "$lab_dir"/{init,lab-link,state.sh,machine.sh}
    } | sha256sum | cut -c1-16)
    state="$cache/state-$key"
    if [[ ! -e $state/devices ]]; then
        mkdir -p "$cache"
        exec {lock}>"$cache/state.lock"
        flock -n "$lock" || {
            say "another run is booting a guest, waiting"
            flock "$lock"
        }
        # Another run may have made it while this one waited.
        [[ -e $state/devices ]] || save_state "$@"
        exec {lock}>&-
    fi
    # The age that forget_states goes by.
    touch "$state"
}

# Boots the guest to "ready" and saves it as $state.
save_state() {
    local new=$state.new begin line=''
    begin=$(now_ms)
    say "booting $FARBUS_LAB_KERNEL_RELEASE once, to save its ready state"
    forget_states
    rm -rf "$new"
    mkdir "$new"
    (
        trap 'kill_qemu' EXIT
        add_scripts "$FARBUS_LAB_INITRAMFS" "$new/initramfs"
        truncate -s "$job_disk_bytes" "$new/job"
        # shellcheck disable=SC2054 # the commas are QEMU's
        link=()
        [[ $2 == 1 ]] || link=(-netdev "stream,id=link,server=on,addr.type=unix,addr.path=$work/link.boot")
        start_qemu "$new" \
            -object "memory-backend-file,id=mem,size=$3,mem-path=$new/ram,share=on" \
            -chardev "file,id=console,path=$new/console" \
            -chardev null,id=out -chardev null,id=err -chardev null,id=files \
            -drive "if=none,id=job,format=raw,readonly=on,file=$new/job" "${link[@]}" \
            -kernel "$FARBUS_LAB_KERNEL" -initrd "$new/initramfs" \
            -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable farbus.hosts=$2 $4${5:+ $pci_words}"
        exec {control}<>"$new/control.out"
        until hear "$control"; do
            kill -0 "$qemu" 2>/dev/null || guest_failed "$new" "QEMU ended"
            (($(now_ms) - begin < 300000)) || guest_failed "$new" "nothing was heard from it in 300 s"
        done
        [[ $line == ready ]] || guest_failed "$new" "$line"
        qmp_open "$new"
        qmp_do migrate "{\"uri\":\"file:$new/devices.new\"}"
        until qmp_do query-migrate '{}' && [[ $answer == *'"status": "completed"'* ]]; do
            [[ $answer != *'"status": "failed"'* ]] || die "QEMU cannot save the guest's state: $answer"
            sleep 0.05
        done
        kill_qemu
        # Not even a power failure may leave half a state that looks whole.
        sync "$new/ram" "$new/devices.new"
        rm -f "$new"/{job,initramfs,qemu.log,control.*,monitor.*}
        mv "$new/devices.new" "$new/devices"
        rm -rf "$state"
        mv -T "$new" "$state"
    ) || exit
    say "saved after $(($(now_ms) - begin)) ms: $(du -sh "$state" | cut -f1) in $state"
}

# The guest in folder $1 answered $2 instead of "ready".
guest_failed() {
    sed 's/^/guest: /' "$1/console" >&2
    sed 's/^/qemu: /' "$1/qemu.log" >&2
    die "the soft-RoCE guest did not come up: ${2#failed }"
}
kill_qemu() {
    [[ -z ${qemu:-} ]] || { kill -9 "$qemu" && wait "$qemu"; } 2>/dev/null || true
    qemu=''
}

# Writes the initramfs $1 with the guest's scripts added as $2: a second archive, which the kernel unpacks over the first.
add_scripts() {
    local tree
    tree=$(mktemp -d)
    mkdir -p "$tree/usr/bin" "$tree/etc"
    cp "$lab_dir/init" "$tree/init"
    cp "$lab_dir/lab-link" "$tree/usr/bin/"
    printf 'root:x:0:0:root:/root:/bin/sh\n' >"$tree/etc/passwd"
    printf 'root:x:0:\n' >"$tree/etc/group"
    printf 'hosts: files\n' >"$tree/etc/nsswitch.conf"
    printf '127.0.0.1 localhost\n192.0.2.1 a\n192.0.2.2 b\n' >"$tree/etc/hosts"
    chmod 755 "$tree/init" "$tree/usr/bin/lab-link"
    cp "$1" "$2"
    # The kernel looks for the next archive at a multiple of 4 bytes.
    truncate -s "%4" "$2"
    (cd "$tree" && find . | LC_ALL=C sort | "$FARBUS_BUSYBOX" cpio -o -H newc -R 0:0 2>/dev/null) | gzip -9n >>"$2"
    rm -rf "$tree"
}

# Removes what killed runs left, and all but the six states used last, if they are older than an hour: one that is about to
# be restored is younger, and a guest that runs keeps its files open. The caller holds the lock.
forget_states() {
    local cache old
    cache=$(lab_cache)
    rm -rf "$cache"/state-*.new
    while read -r old; do
        [[ -z $(find "$old" -maxdepth 0 -mmin +60) ]] || rm -rf "$old"
    done < <(find "$cache" -maxdepth 1 -name 'state-*' -type d -printf '%T@ %p\n' | sort -rn | sed '1,6d; s/^[^ ]* //')
}

# Opens the QMP monitor in folder $1.
qmp_open() {
    exec {monitor_in}<>"$1/monitor.in" {monitor_out}<>"$1/monitor.out"
    qmp_do qmp_capabilities '{}'
}
# Executes command $1 with arguments $2, and sets `answer`. Events and the greeting are passed over.
qmp_do() {
    printf '{"execute":"%s","arguments":%s}\n' "$1" "$2" >&"$monitor_in"
    while read -r -t 30 answer <&"$monitor_out" || die "QEMU's monitor does not answer to $1"; do
        case $answer in
        '{"return"'*) return ;;
        '{"error"'*) die "QEMU refuses $1: $answer" ;;
        esac
    done
}
