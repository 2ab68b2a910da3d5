#!/bin/sh
# Builds edgeopt-runner for a phone or board from the sources beside this script.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
usage() {
    cat <<END
usage: [CXX=COMPILER] sh build.sh --libraries DIR [--include DIR]... [--define NAME]... [--output DIR]

  CXX              the C++17 compiler for the device (default c++, for this computer): for Android the NDK's
                   .../bin/aarch64-linux-android24-clang++, for boards aarch64-linux-gnu-g++
  --libraries DIR  where the runtime's shared libraries for the device are: @LIBRARIES@
  --include DIR    the runtime's headers, where it has any: @HEADERS@
  --output DIR     gets edgeopt-runner and copies of the libraries; default ./edgeopt-runner-<machine>

Then: device/check --runner DIR/edgeopt-runner
END
}
flags='' libraries='' output='' machine=$(${CXX:-c++} -dumpmachine)
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --libraries | --include | --define | --output)
            [ $# -gt 1 ] || { echo "error: $1 lacks its value" >&2; exit 2; }
            case $1 in
                --libraries) libraries=$2 ;;
                --include) flags="$flags -I $2" ;;
                --define) flags="$flags -D $2" ;;
                --output) output=$2 ;;
            esac
            shift 2 ;;
        *) usage >&2; exit 2 ;;
    esac
done
[ "$libraries" ] || { usage >&2; exit 2; }
output=${output:-./edgeopt-runner-$machine}
case $machine in
    *android*) flags="$flags -static-libstdc++" ;; # devices have no shared one for programs
esac
mkdir -p "$output"
for pattern in @PATTERNS@; do
    for library in "$libraries"/$pattern; do
        [ -f "$library" ] && cp -L "$library" "$output/"
    done
done
set -- "$output"/lib*.so*
[ -f "$1" ] || { echo "error: $libraries has none of @LIBRARIES@" >&2; exit 3; }
# Kernels and backends register themselves as they are loaded: the linker must keep those that nothing calls.
# shellcheck disable=SC2086 # flags are words
${CXX:-c++} -std=c++17 -O2 $flags "$here"/*.cpp -Wl,--no-as-needed "$@" -Wl,-rpath,'$ORIGIN' -o "$output/edgeopt-runner"
# The program looks for its library by the name that is in the library, not by that of the file.
soname='@SONAME@'
if [ "$soname" ] && grep -q "$soname" "$output/edgeopt-runner" && [ ! -f "$output/$soname" ]; then
    mv "$1" "$output/$soname"
fi
echo "$output/edgeopt-runner"
