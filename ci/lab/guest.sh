# shellcheck shell=bash
# Runs jobs in soft-RoCE guests: restores the saved state, hands over the job, passes the output on, brings files back.
# Sourced, never run. For example `run_one /bin/true` sets status=0 about 2 s later, and `run_one /bin/false` sets status=1.
#
# Expects what ci/softroce has parsed, `state` and machine_args (ready_state), and $work, a folder to be removed at the end.

# By name of guest: QEMU's process, and how the job ended. The readers of the guests' output.
declare -A pids=() ended=() begun=()
readers=()

# Runs program "$@" in one guest; sets status.
run_one() {
    open_events
    start_guest one "$@"
    await_end one
    stop_guests
    status=${ended[one]}
    fetch_files one "$out_dir"
}

open_events() {
    mkfifo "$work/events"
    exec {events}<>"$work/events"
}

# Starts guest $1 (one, a or b) with program "${@:2}" from the saved state, in $work/$1.
start_guest() {
    local name=$1 folder="$work/$1" console each
    mkdir "$folder"
    shift
    pack_job "$folder" "$name" "$@"
    mkfifo "$folder"/{out,err,files}
    "readers_of_$name" "$folder"
    if ((${#outs[@]})); then cat "$folder/files" >"$folder/files.tar" & else cat "$folder/files" >/dev/null & fi
    readers+=($!)
    if [[ -n $shell ]]; then console=stdio,id=console,signal=off; else console="file,id=console,path=$folder/console"; fi
    start_qemu "$folder" \
        -object "memory-backend-file,id=mem,size=$memory,mem-path=$state/ram,share=off,readonly=on,rom=off" \
        -chardev "$console" \
        -chardev "file,id=out,path=$folder/out" -chardev "file,id=err,path=$folder/err" -chardev "file,id=files,path=$folder/files" \
        -drive "if=none,id=job,format=raw,readonly=on,file=$folder/job" "${link[@]}" \
        -incoming "file:$state/devices"
    pids[$name]=$qemu
    qemu=''
    sed -u "s/^/$name /" "$folder/control.out" >"$work/events" &
    readers+=($!)
    # What QEMU reads before the state is loaded is lost, at most the serial port's 16 bytes; empty lines may be.
    printf '%32s\ngo %s\n' '' "$(date +%s)" >"$folder/control.in"
    begun[$name]=$(now_ms)
}

# One guest's output is passed on unmixed.
readers_of_one() {
    cat "$1/out" >&3 &
    readers+=($!)
    cat "$1/err" >&4 &
    readers+=($!)
}

# Waits until guest $1 has `ended`, and meanwhile hears what all say.
await_end() {
    while [[ -z ${ended[$1]:-} ]]; do
        hear_events
    done
}
# The same for "started".
await_start() {
    while [[ -z ${started[$1]:-} && -z ${ended[$1]:-} ]]; do
        hear_events
    done
}
declare -A started=()

# Hears one event, or looks after a second whether all is well.
hear_events() {
    local name word rest
    if read -r -t 1 name word rest <&"$events"; then
        case $word in
        started) started[$name]=yes ;;
        exit) ended[$name]=$rest ;;
        late)
            say "${name/one/the program} was ended after $limit s (--seconds)"
            late[$name]=yes
            ;;
        left) say "$rest processes that the program left running were ended" ;;
        missing)
            say "the program left no $rest"
            missing=yes
            ;;
        failed) guest_lost "$name" "$rest" ;;
        *) guest_lost "$name" "it says '$word $rest'" ;;
        esac
        return
    fi
    for name in "${!pids[@]}"; do
        if [[ -z ${ended[$name]:-} ]]; then
            kill -0 "${pids[$name]}" 2>/dev/null || guest_lost "$name" "QEMU ended"
        fi
        if [[ -z ${started[$name]:-} ]]; then
            (($(now_ms) - ${begun[$name]} < 90000)) || guest_lost "$name" "the job did not start in 90 s"
        elif [[ -z $shell ]]; then
            # The guest has the same limit; this one is for a guest that does not answer any more.
            (($(now_ms) - ${begun[$name]} < (limit + 60) * 1000)) || {
                late[$name]=yes
                say "the guest does not answer; given up after $limit s (--seconds) and a minute more"
                ended[$name]=124
            }
        fi
    done
}
declare -A late=()
missing=''

# Guest $1 is gone or useless, for reason $2.
guest_lost() {
    [[ ! -s $work/$1/console ]] || tail -n 40 "$work/$1/console" | sed 's/^/guest: /' >&2
    sed 's/^/qemu: /' "$work/$1/qemu.log" >&2
    if [[ -z ${started[$1]:-} ]]; then
        rm -rf "$state"
        die "the soft-RoCE guest failed: $2. Its saved state is removed; the next run boots afresh"
    fi
    die "the soft-RoCE guest failed while the program ran: $2"
}

# Ends QEMU everywhere; then the rest of the output comes out.
stop_guests() {
    local name
    for name in "${!pids[@]}"; do
        { kill -9 "${pids[$name]}" && wait "${pids[$name]}"; } 2>/dev/null || true
        unset "pids[$name]"
        [[ -z ${late[$name]:-} ]] || ended[$name]=124
    done
    wait "${readers[@]}" || true
    readers=()
}

# Puts the files of guest $1 into folder $2, each under its last name.
fetch_files() {
    local path tree="$work/$1/tree"
    ((${#outs[@]})) || return 0
    mkdir -p "$tree" "$2"
    [[ ! -s $work/$1/files.tar ]] || tar -C "$tree" -xf "$work/$1/files.tar" --no-same-owner || die "the files of the guest do not unpack"
    for path in "${outs[@]}"; do
        [[ ! -e $tree$path ]] || {
            rm -rf "${2:?}/${path##*/}"
            mv "$tree$path" "$2/"
        }
    done
}

# For the end of the lab, however it comes.
end_guests() {
    kill_qemu
    ((${#pids[@]} == 0)) || kill -9 "${pids[@]}" 2>/dev/null || true
    ((${#readers[@]} == 0)) || kill "${readers[@]}" 2>/dev/null || true
}
