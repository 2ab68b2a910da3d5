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
libraries='' output='' machine=$(${CXX:-c++} -dumpmachine)
left=$#
while [ $left -gt 0 ]; do # the compiler's flags gather behind the words that are still to be read
    case $1 in
        --help | -h) usage; exit 0 ;;
        --libraries | --include | --define | --output)
            [ $left -gt 1 ] || { echo "error: $1 lacks its value" >&2; exit 2; }
            case $1 in
                --libraries) libraries=$2 ;;
                --include) set -- "$@" -I "$2" ;;
                --define) set -- "$@" -D "$2" ;;
                --output) output=$2 ;;
            esac
            shift 2
            left=$((left - 2)) ;;
        *) usage >&2; exit 2 ;;
    esac
done
[ "$libraries" ] || { usage >&2; exit 2; }
output=${output:-./edgeopt-runner-$machine}
case $machine in
    *android*) set -- "$@" -static-libstdc++ ;; # devices have no shared one for programs
esac
mkdir -p "$output"
for pattern in @PATTERNS@; do
    for library in "$libraries"/$pattern; do
        [ -f "$library" ] && cp -L "$library" "$output/"
    done
done
found=$(find "$output" -name 'lib*.so*' | head -n 1)
[ "$found" ] || { echo "error: $libraries has none of @LIBRARIES@" >&2; exit 3; }
# What the runner shares with the C++ app is there, where the bundle has one.
app=$here/../../cpp
[ -f "$here/@SOURCE@" ] || set -- "$@" -I "$app" "$app/@SOURCE@"
# Kernels and backends register themselves as they are loaded: the linker must keep those that nothing calls.
${CXX:-c++} -std=c++17 -O2 "$@" "$here"/*.cpp -Wl,--no-as-needed "$output"/lib*.so* -Wl,-rpath,'$ORIGIN' \
    -o "$output/edgeopt-runner"
# The program looks for its library by the name that is in the library, not by that of the file.
soname='@SONAME@'
if [ "$soname" ] && grep -q "$soname" "$output/edgeopt-runner" && [ ! -f "$output/$soname" ]; then
    mv "$found" "$output/$soname"
fi
echo "$output/edgeopt-runner"
