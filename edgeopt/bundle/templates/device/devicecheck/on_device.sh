# The part of the check that runs on the device, sent over the connection as `sh -s -- COMMAND ARGUMENTS`.
# Written for what Android (mksh, toybox), busybox and dash have in common: no awk, no arrays, no `local`.

facts() { # BASE -> KEY=VALUE lines about the device
    android=$(getprop ro.build.version.release 2>/dev/null)
    if [ -n "$android" ]; then
        echo "os=android"
        echo "os_version=Android $android (API $(getprop ro.build.version.sdk))"
        echo "abi=$(getprop ro.product.cpu.abi)"
        echo "manufacturer=$(getprop ro.product.manufacturer)"
        echo "model=$(getprop ro.product.model)"
        soc=$(getprop ro.soc.model)
        echo "soc=${soc:-$(getprop ro.board.platform)}"
        [ "$(getprop ro.boot.qemu)$(getprop ro.kernel.qemu)" ] && echo "emulated=1"
    else
        echo "os=linux"
        echo "os_version=$(. /etc/os-release 2>/dev/null && echo "$PRETTY_NAME")"
        echo "abi=$(uname -m)"
        echo "manufacturer=$(cat /sys/class/dmi/id/sys_vendor 2>/dev/null)"
        model=$(tr -d '\000' 2>/dev/null </proc/device-tree/model)
        echo "model=${model:-$(cat /sys/class/dmi/id/product_name 2>/dev/null)}"
        echo "soc=$(cat /sys/devices/soc0/family 2>/dev/null) $(cat /sys/devices/soc0/soc_id 2>/dev/null)"
    fi
    echo "kernel=$(uname -s) $(uname -r)"
    echo "machine=$(uname -m)"
    while read -r name value _; do
        [ "$name" = MemTotal: ] && echo "memory_kb=$value"
    done </proc/meminfo
    set -- $(df -Pk "$1" 2>/dev/null | tail -n 1)
    echo "free_kb=${4:-}"
    echo "now=$(date +%s)"
    for tool in taskset setsid sha256sum; do
        command -v $tool >/dev/null 2>&1 && echo "tool=$tool"
    done
    return 0
}

first_of() { # FILES -> the first line of the first readable one
    for file in "$@"; do
        if [ -r "$file" ] && read -r line <"$file" 2>/dev/null; then
            echo "$line"
            return
        fi
    done
}

state() { # -> lines of fields separated by "|": clocks, temperatures, battery
    for policy in /sys/devices/system/cpu/cpufreq/policy*; do
        [ -d "$policy" ] || continue
        cpus=$(first_of "$policy/related_cpus" "$policy/affected_cpus")
        governor=$(first_of "$policy/scaling_governor")
        echo "policy|$cpus|$governor|$(first_of "$policy/cpuinfo_cur_freq" "$policy/scaling_cur_freq")|$(
            first_of "$policy/scaling_max_freq")|$(first_of "$policy/cpuinfo_max_freq")"
    done
    for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
        [ -d "$cpu" ] && echo "cpu|${cpu##*/cpu}|$(first_of "$cpu/online")|$(first_of "$cpu/cpu_capacity")"
    done
    for zone in /sys/class/thermal/thermal_zone*; do
        [ -d "$zone" ] && echo "zone|$(first_of "$zone/type")|$(first_of "$zone/temp")"
    done
    for cooler in /sys/class/thermal/cooling_device*; do
        [ -d "$cooler" ] && echo "cooler|$(first_of "$cooler/type")|$(first_of "$cooler/cur_state")"
    done
    for supply in /sys/class/power_supply/*; do
        [ "$(first_of "$supply/type")" = Battery ] || continue
        echo "battery|$(first_of "$supply/capacity")|$(first_of "$supply/status")|$(first_of "$supply/temp")"
    done
    if command -v dumpsys >/dev/null 2>&1; then
        dumpsys thermalservice 2>/dev/null | while read -r first second third _; do
            [ "$first $second" = "Thermal Status:" ] && echo "thermal_status|$third"
        done
        dumpsys battery 2>/dev/null | while read -r key value _; do
            case $key in level: | temperature: | status: | powered:) echo "dumpsys_battery|${key%:}|$value" ;; esac
        done
    fi
    return 0
}

leases() { # BASE -> "DIRECTORY|LEASE" of what earlier checks left there; in /tmp others could put such directories, too
    for directory in "$1"/edgeopt-*; do
        [ -d "$directory" ] && [ ! -L "$directory" ] && [ -O "$directory" ] && echo "$directory|$(first_of "$directory/lease")"
    done
    return 0
}

create() { # DIRECTORY LEASE: appears with its lease, or not at all
    umask 077
    [ ! -e "$1" ] || return 1
    if mkdir "$1.new" && mkdir "$1.new/in" "$1.new/lib" "$1.new/out" && lease "$1.new" "$2" && mv "$1.new" "$1"; then
        return 0
    fi
    rm -rf "$1.new"
    return 1
}

lease() { # DIRECTORY LEASE: until when, and for whom, the directory is in use
    echo "$2" >"$1/lease"
}

space() { # DIRECTORY -> free KiB
    set -- $(df -Pk "$1" 2>/dev/null | tail -n 1)
    echo "${4:-}"
}

digest() { # FILE -> SHA-256 and size of the file
    set -- "$1" $(sha256sum "$1" 2>/dev/null)
    echo "${2:--} $(wc -c <"$1")"
}

stop() { # DIRECTORY: the program that runs there and, where it leads a group, its children
    pid=$(first_of "$1/pid")
    case $pid in
        '' | *[!0-9]*) ;;
        *) kill -9 "-$pid" 2>/dev/null || kill -9 "$pid" 2>/dev/null ;;
    esac
}

remove() { # DIRECTORY: ends what runs there; refuses any other directory than one of ours
    case $1 in
        */..* | *[!A-Za-z0-9._/-]*) return 1 ;;
        */edgeopt-????????) ;;
        *) return 1 ;;
    esac
    stop "$1"
    rm -rf "$1" "$1.new"
    [ ! -e "$1" ]
}

execute() { # DIRECTORY SECONDS MASK PROGRAM ARGUMENTS: 124 when it was killed for taking longer
    directory=$1 limit=$2 mask=$3
    shift 3
    cd "$directory" || return 1
    if [ "$(ls lib)" ]; then
        set -- env "LD_LIBRARY_PATH=$directory/lib" "$@"
    fi
    if [ "$mask" ]; then
        set -- taskset "$mask" "$@"
    fi
    # It says itself which process it is: some setsid start another one for it.
    set -- sh -c 'echo $$ >pid; exec "$@"' sh "$@"
    if setsid -w true >/dev/null 2>&1; then # its own process group, so that its children are stopped with it
        set -- setsid -w "$@" # toybox's may fork, and then waits only when it is told to
    elif command -v setsid >/dev/null 2>&1; then # busybox's doesn't fork here, and knows no -w
        set -- setsid "$@"
    fi
    rm -f late
    "$@" </dev/null >stdout 2>stderr &
    program=$!
    ( # Holds no stream of ours: the connection would stay open as long as it sleeps.
        trap 'kill $nap; exit' TERM
        sleep "$limit" &
        nap=$!
        wait $nap
        : >late
        stop .
    ) </dev/null >/dev/null 2>&1 &
    watchdog=$!
    wait $program
    code=$?
    rm -f pid
    kill $watchdog 2>/dev/null
    [ -e late ] && code=124
    tail -c 20000 stdout
    tail -c 4000 stderr >&2
    return $code
}

having() { # NAMES -> the first that is a program, by name or in the directory for such things
    for name in "$@"; do
        for place in "$name" "/data/local/tmp/$name"; do
            if command -v "$place" >/dev/null 2>&1; then
                command -v "$place"
                return
            fi
        done
    done
    return 0
}

imports() { # PYTHON MODULE: whether the board's Python has a module and NumPy
    "$1" -c "import numpy, importlib.util, sys; sys.exit(importlib.util.find_spec('$2') is None)" >/dev/null 2>&1 &&
        echo yes
    return 0
}

"$@"
