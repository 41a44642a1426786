# shellcheck shell=bash disable=SC2154 # cache and list are the caller's
# How the labs get Debian packages without installing them: an apt of our own in a cache folder, whose packages are kept
# with their sums. Sourced, never run. For example `configure_apt "$keyring" bookworm </dev/null; update; candidate perftest` prints
# 4.5+0.17-1, and the host's own apt has not been touched.
#
# Expects $cache, the folder, and $list, the file of sums in $cache/debs. FARBUS_DEBIAN_MIRROR and FARBUS_KEYRING: see fetch.

mirror=${FARBUS_DEBIAN_MIRROR:-http://deb.debian.org/debian}
keyring=${FARBUS_KEYRING:-/usr/share/keyrings/debian-archive-keyring.gpg}

# Runs "$@" while no other process does so in this cache. The tools are looked for first.
alone() {
    local tool lock
    for tool in apt-get apt-cache dpkg flock sha256sum; do
        command -v "$tool" >/dev/null || die "$tool not found: the lab is made from Debian packages and needs Debian 12 or newer"
    done
    mkdir -p "$cache/debs/partial"
    exec {lock}>"$cache/lock"
    flock -n "$lock" || {
        say "another fetch is at work in $cache, waiting"
        flock "$lock"
    }
    "$@"
    exec {lock}>&-
}

# True if every package of an earlier, finished download is still there unharmed.
kept_debs() {
    [[ -s $list ]] || return 1
    (cd "$cache/debs" && sha256sum --check --quiet --status "$list") || {
        say "a kept package is missing or damaged, resolving again"
        rm -f "$list"
        return 1
    }
    say "using the $(wc -l <"$list") packages kept in $cache/debs"
}

# Writes an apt configuration of our own: nothing of the host's is read or written except how to reach the
# network (proxies) and its archive keys. $1 keyring, the rest are suites; standard input is the pins, as apt's preferences.
configure_apt() {
    local ring=$1 suite apt="$cache/apt"
    shift
    [[ -s $ring ]] || die "no Debian archive keyring at $ring: install debian-archive-keyring or name one with FARBUS_KEYRING"
    [[ $cache != *[\"\;\ ]* ]] || die "apt cannot work in a folder whose name has spaces, quotes or semicolons: $cache; set FARBUS_CACHE"
    # Not the newer keyring, which lies beside it.
    rm -rf "${apt:?}/etc"
    mkdir -p "$apt/etc/parts" "$apt/etc/preferences.d" "$apt/state/lists/partial" "$apt/cache"
    : >"$apt/status"
    for suite; do
        # Debian keeps its security suites in an archive beside the main one.
        case $suite in
        *-security) printf 'deb [arch=amd64 signed-by=%s] %s-security %s main\n' "$ring" "${mirror%/}" "$suite" ;;
        *) printf 'deb [arch=amd64 signed-by=%s] %s %s main\n' "$ring" "$mirror" "$suite" ;;
        esac
    done >"$apt/etc/sources.list"
    cat >"$apt/etc/preferences"
    {
        apt-config dump | grep -E '^Acquire::(http|https|Check-Date|Check-Valid-Until|ForceIPv)' || true
        cat <<END
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Cache::archives "$cache/debs";
Dir::Etc "$apt/etc";
Dir::Etc::parts "$apt/etc/parts";
Dir::Etc::main "$apt/etc/none";
Dir::Etc::sourceparts "$apt/etc/parts";
Dir::Etc::sourcelist "$apt/etc/sources.list";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "/dev/null";
Dir::Etc::preferences "$apt/etc/preferences";
Dir::Etc::preferencesparts "$apt/etc/preferences.d";
Dir::Etc::netrc "/etc/apt/auth.conf";
Dir::Etc::netrcparts "/etc/apt/auth.conf.d";
Dir::Log "$apt/log";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Get::Assume-Yes "true";
APT::Keep-Downloaded-Packages "true";
APT::Sandbox::User "root";
APT::Color "false";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Retries "3";
Acquire::AllowInsecureRepositories "false";
END
    } >"$apt/apt.conf.new"
    mv "$apt/apt.conf.new" "$apt/apt.conf"
}

# apt under the configuration above. It inherits our lock: an apt that outlives a killed fetch keeps the next one waiting.
apt_get() {
    APT_CONFIG="$cache/apt/apt.conf" LC_ALL=C apt-get -q "$@" 2>&1 |
        { grep -E '^(Get:|Err:|Ign:|Fetched|[EW]:)' || true; } >&2
}
apt_cache() { APT_CONFIG="$cache/apt/apt.conf" LC_ALL=C apt-cache "$@"; }
update() { apt_get update -o APT::Update::Error-Mode=any; }

# The version that apt would take of package $1.
candidate() { apt_cache policy "$1" | sed -n 's/^  Candidate: //p'; }

# A host whose keyring predates trixie: bookworm carries a newer keyring, signed with keys that such a host has. Leaves the
# newer one in $keyring, to be configured with.
newer_keyring() {
    local fresh="$cache/apt/keyring"
    say "$keyring cannot verify trixie or the network failed; trying the newer keyring from bookworm"
    rm -rf "$fresh" && mkdir -p "$fresh"
    configure_apt "$keyring" bookworm </dev/null
    update || die "cannot read $mirror: check the network, or name a mirror with FARBUS_DEBIAN_MIRROR"
    (cd "$fresh" && apt_get download debian-archive-keyring && dpkg -x debian-archive-keyring_*.deb .)
    keyring="$fresh/usr/share/keyrings/debian-archive-keyring.gpg"
}

# The names of the packages that apt would install for "$@".
package_names() {
    # --print-uris leaves out what is already in the cache, so the names come from a cache that is empty.
    APT_CONFIG="$cache/apt/apt.conf" LC_ALL=C apt-get -qq -o Dir::Cache::archives="$cache/apt/cache/empty" \
        install --print-uris "$@" | awk '{ print $2 }'
}

# The packages of the kernel that the meta package $1 of version $2 names, one a line: the image, and what newer ones split
# from it. Other dependencies (an initramfs maker) are not ours.
kernel_packages() {
    local image
    image=$(apt_cache depends "$1=$2" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p')
    [[ -n $image ]] || die "$1 $2 names no kernel image"
    printf '%s\n' "$image"
    apt_cache depends "$image=$2" | sed -nE 's/^ *Depends: (linux-(base|binary|modules)-[0-9].*)$/\1/p'
}

# Downloads packages "${@:2}" of version $1 without what they depend on, and prints the names of the files.
download_exactly() {
    local version=$1 name
    shift
    (cd "$cache/debs" && apt_get download "${@/%/=$version}")
    for name; do
        printf '%s\n' "${name}_${version//:/%3a}_amd64.deb"
    done
}

# Ends a download: every package named in $1, one a line, must be there. The list appears only when all are, so half a
# download is never taken for a whole one.
downloaded() {
    (cd "$cache/debs" && xargs sha256sum <<<"$1") >"$list.new"
    mv "$list.new" "$list"
    # 140 MB of package lists; the next download wants fresh ones anyway.
    rm -rf "${cache:?}/apt"
}

# Unpacks every package of the list into the folder $1, and prints the kernel's release; the kernel is boot/vmlinuz-RELEASE.
unpack_debs() {
    local deb release kernel
    # The usual merge of /lib and /usr/lib: packages ship to both.
    mkdir -p "$1/usr/"{bin,sbin,lib,lib64}
    ln -s usr/bin usr/sbin usr/lib usr/lib64 "$1/"
    while read -r _ deb; do
        # dpkg -x would put a folder in the place of such a link.
        dpkg-deb --fsys-tarfile "$cache/debs/$deb" | tar -C "$1" -x --keep-directory-symlink --no-same-owner || die "cannot unpack $deb"
    done <"$list"
    # Newer packages leave the kernel with its modules.
    for kernel in "$1"/usr/lib/modules/*/vmlinuz; do
        [[ -e $kernel ]] || continue
        release=${kernel%/vmlinuz}
        mkdir -p "$1/boot"
        mv "$kernel" "$1/boot/vmlinuz-${release##*/}"
    done
    release=$(cd "$1" && find boot -name 'vmlinuz-*' -printf '%f\n') || true
    [[ -n $release ]] || die "the kernel's packages hold no vmlinuz"
    printf '%s\n' "${release#vmlinuz-}"
}
