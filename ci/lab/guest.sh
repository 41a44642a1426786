# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# Runs jobs in soft-RoCE guests: restores the saved state, hands over the job, passes the output on, brings files back.
# Sourced, never run. For example `run_one /bin/true` sets status=0 about 2 s later, and `run_one /bin/false` sets status=1.
#
# Expects what ci/softroce has parsed, `state` and machine_args (ready_state), and $work, a folder to be removed at the end.

# By name of guest: QEMU's process, and how the job ended. The readers of the guests' output.
declare -A pids=() begun=() up=() started=() said=() ended=() late=()
readers=()

# Runs program "$@" in one guest; sets status.
run_one() {
    open_events
    start_guest one "$@"
    [[ -z $shell ]] || connect_shell one
    await ended one
    stop_guests
    status=${ended[one]}
    fetch_files one "$out_dir"
}

# Runs on two guests with a link between them the words before ":::" on a, and those after it on b; without a ":::" all on both. Sets status.
# b begins when a has begun, or has printed a line with $b_when. With $end_with a or b, the other is ended when that one has.
run_two() {
    local -a a=() b=()
    local other stopped=''
    while (($#)) && [[ $1 != ::: ]]; do
        a+=("$1")
        shift
    done
    if (($#)); then b=("${@:2}"); else b=("${a[@]}"); fi
    # A shell is on a, and b waits for its end.
    [[ -z $shell ]] || {
        ((${#b[@]})) || b=(sleep 1000000)
        end_with=a
    }
    ((${#b[@]} && (${#a[@]} || ${#shell}))) || die "a program is needed on both sides of ':::'"
    open_events
    link=(-netdev "stream,id=link,server=on,addr.type=unix,addr.path=$work/link")
    start_guest a "${a[@]}"
    until [[ -S $work/link ]]; do
        kill -0 "${pids[a]}" 2>/dev/null || guest_lost a "QEMU ended before its link was there"
        sleep 0.02
    done
    link=(-netdev "stream,id=link,server=off,addr.type=unix,addr.path=$work/link")
    start_b "${b[@]}"
    await up a b
    let_run a
    [[ -z $shell ]] || connect_shell a
    await started a
    [[ -z $b_when ]] || await said a
    [[ -z $b_when || -n ${said[a]:-} ]] || die "a ended with status ${ended[a]} and never printed '$b_when'"
    let_run b
    case $end_with in
    a | b)
        other=${end_with/a/b}
        [[ $end_with == a ]] || other=a
        await ended "$end_with"
        [[ -n ${ended[$other]:-} ]] || {
            stopped=$other
            echo stop >"$work/$other/control.in"
        }
        ;;
    esac
    await ended a b
    stop_guests
    status=0
    for other in b a; do
        say "$other ended with status ${ended[$other]}${stopped:+$([[ $stopped != "$other" ]] || echo ', told to')}"
        [[ ${ended[$other]} == 0 || $other == "$stopped" ]] || status=${ended[$other]}
        fetch_files "$other" "$out_dir/$other"
    done
}
start_b() {
    local limit=$limit
    # Nobody's time is limited while there is a shell.
    [[ -z $shell ]] || limit=1000000
    local shell=''
    start_guest b "$@"
}
let_run() { echo run >"$work/$1/control.in"; }

open_events() {
    mkfifo "$work/events"
    exec {events}<>"$work/events"
}

# Starts guest $1 (one, a or b) with program "${@:2}" from the saved state, in $work/$1.
start_guest() {
    local name=$1 folder="$work/$1" console
    mkdir "$folder"
    shift
    pack_job "$folder" "$name" "$@"
    mkfifo "$folder"/{out,err,files}
    "readers_of_$name" "$folder"
    if ((${#outs[@]})); then cat "$folder/files" >"$folder/files.tar" & else cat "$folder/files" >/dev/null & fi
    readers+=($!)
    console="file,id=console,path=$folder/console"
    [[ -z $shell ]] || {
        mkfifo "$folder"/shell.{in,out}
        cat "$folder/shell.out" >&3 &
        readers+=($!)
        console="pipe,id=console,path=$folder/shell"
    }
    pci_args=()
    [[ -z $pci ]] || pci_devices "$folder"
    start_qemu "$folder" \
        -object "memory-backend-file,id=mem,size=$memory,mem-path=$state/ram,share=off,readonly=on,rom=off" \
        -chardev "$console" \
        -chardev "file,id=out,path=$folder/out" -chardev "file,id=err,path=$folder/err" -chardev "file,id=files,path=$folder/files" \
        -drive "if=none,id=job,format=raw,readonly=on,file=$folder/job" "${link[@]}" "${pci_args[@]}" \
        -incoming "file:$state/devices"
    pids[$name]=$qemu
    qemu=''
    sed -u "s/^/$name /" "$folder/control.out" >"$work/events" &
    readers+=($!)
    # What QEMU reads before the state is loaded is lost, at most the serial port's 16 bytes; empty lines may be.
    printf '%32s\ngo %s\n' '' "$(date +%s)" >"$folder/control.in"
    begun[$name]=$(now_ms)
}

# Gives our standard input to the shell in guest $1, not before it is there: what comes earlier is lost. At its end comes the guest's
# end-of-file character.
connect_shell() {
    await started "$1"
    [[ -z $terminal ]] || stty raw -echo <&5
    { cat <&5 && printf '\4\4\4'; } >"$work/$1/shell.in" &
    typist=$!
}
typist=''

# One guest's output is passed on unmixed.
readers_of_one() {
    cat "$1/out" >&3 &
    readers+=($!)
    cat "$1/err" >&4 &
    readers+=($!)
}

# The output of two is passed on by lines, with the name before each; as it is it goes to files, in the folder of --out-dir if there is one.
readers_of_a() { prefixed a "$1"; }
readers_of_b() { prefixed b "$1"; }
prefixed() {
    local raw="$2" stream to
    [[ -z $keep_output ]] || raw="$out_dir/$1"
    mkdir -p "$raw"
    for stream in out:3 err:4; do
        to=${stream#*:} stream=${stream%:*}
        # A reader that ends early would end tee.
        tee "$raw/std$stream" <"$2/$stream" | tee >(watch_for "$1") | sed -u "s/^/$1| /" >&"$to" &
        readers+=($!)
    done
}
# Reads all of standard input; the first line with $b_when that $1 prints is an event, if $1 is a.
watch_for() {
    if [[ $1 == a && -n $b_when ]] && grep -qm1 -F -e "$b_when"; then echo "a said" >"$work/events"; fi
    cat >/dev/null
}

# Waits until each guest of "${@:2}" has had the event $1 (up, started, said, ended) or has ended, and meanwhile hears what all say.
await() {
    local -n had=$1
    local which
    for which in "${@:2}"; do
        while [[ -z ${had[$which]:-} && -z ${ended[$which]:-} ]]; do
            hear_events
        done
    done
}

# Hears one event, or looks after a second whether all is well.
hear_events() {
    local name word rest line
    if hear "$events"; then
        read -r name word rest <<<"$line"
        case $word in
        up) up[$name]=yes ;;
        started) started[$name]=yes ;;
        said) said[$name]=yes ;;
        exit) ended[$name]=$rest ;;
        late)
            late[$name]=yes
            show_console "$name"
            say "${name/one/the program} was ended after $limit s (--seconds); the guest's console above says where it was"
            ;;
        left) say "${name/one/the program} left processes running, which were ended: $rest" ;;
        missing)
            say "${name/one/the program} left no $rest"
            missing=yes
            ;;
        kernel)
            show_console "$name"
            say "the guest's kernel complained $rest"
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
        if [[ -z ${started[$name]:-}${up[$name]:-} ]]; then
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
missing=''

# Guest $1 is gone or useless, for reason $2.
guest_lost() {
    show_console "$1"
    sed 's/^/qemu: /' "$work/$1/qemu.log" >&2
    if [[ -z ${started[$1]:-} && $2 == QEMU* ]]; then
        rm -rf "$state"
        die "the soft-RoCE guest did not start: $2. Its saved state is removed; run again, it boots afresh"
    fi
    [[ -n ${started[$1]:-} ]] || die "the soft-RoCE guest did not start: $2"
    die "the soft-RoCE guest failed while the program ran: $2"
}

show_console() { [[ ! -s $work/$1/console ]] || tail -n 60 "$work/$1/console" | sed 's/^/guest: /' >&2; }

# Ends QEMU everywhere; then the rest of the output comes out.
stop_guests() {
    local name
    for name in "${!pids[@]}"; do
        { kill -9 "${pids[$name]}" && wait "${pids[$name]}"; } 2>/dev/null || true
        unset "pids[$name]"
        [[ -z ${late[$name]:-} ]] || ended[$name]=124
    done
    [[ -z $typist ]] || kill "$typist" 2>/dev/null || true
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
    [[ -z $typist ]] || kill "$typist" 2>/dev/null || true
    ((${#pids[@]} == 0)) || { kill -9 "${pids[@]}" && wait "${pids[@]}"; } 2>/dev/null || true
    ((${#readers[@]} == 0)) || kill "${readers[@]}" 2>/dev/null || true
}
