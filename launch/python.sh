#!/bin/sh
# Prints the path of the Python that engrax should be installed with; explains itself on stderr when there is none.
#
#   launch/python.sh             the best Python on this machine
#   launch/python.sh 3.12        the same, among those of one version
#   launch/python.sh PYTHON      that program, checked the same way
#
# A candidate must really run (a pyenv shim without a version behind it does not), be able to make environments
# (Debian packages `venv` apart) and have the GIL (most wheels need it).
set -u

# Best first. 3.11 is the lowest supported (setup.py). engrax is tested up to 3.13; all its dependencies have wheels
# for 3.14 too, so that one serves where nothing else is there. 3.15 is absent: grain, dm-tree and tensorstore have
# no wheels for it.
versions="3.13 3.12 3.11 3.14"

check='
import sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
if version not in sys.argv[1].split():
    sys.exit("is Python " + version)
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("is a free-threaded build")
try:
    import ctypes, ensurepip, ssl, venv
except ImportError as error:
    sys.exit("lacks the module " + str(error.name))
print(version)
'

# Writes "VERSION PATH" for a candidate that fits, "- PATH REASON" for one that does not.
examine() {
    if answer=$("$1" -c "$check" "$versions" 2>&1 </dev/null); then
        echo "$answer $1"
    else
        echo "- $1 $(echo "$answer" | head -n 1)"
    fi
}

candidates() {
    echo "$PATH" | tr ':' '\n' | while read -r folder; do
        for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
            [ -x "$folder/$name" ] && [ ! -d "$folder/$name" ] && examine "$folder/$name"
        done
    done
    for file in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3 "$HOME"/.local/share/uv/python/*/bin/python3; do
        [ -x "$file" ] && examine "$file"
    done
}

case ${1:-} in
    "") ;;
    3.[0-9] | 3.[0-9][0-9])
        case " $versions " in
            *" $1 "*) versions=$1 ;;
            *) echo "PYTHON=$1 cannot be used: engrax needs one of $versions." >&2; exit 1 ;;
        esac ;;
    *)
        chosen=$(command -v "$1") || { echo "PYTHON=$1 cannot be used: there is no such program." >&2; exit 1; }
        found=$(examine "$chosen")
        wanted="PYTHON=$1 cannot be used, engrax needs one of $versions:" ;;
esac
if [ -z "${found:-}" ]; then
    found=$(candidates)
    wanted="No usable Python was found on PATH, in ~/.pyenv or among those of uv. engrax needs one of $versions. Looked at:"
fi

for version in $versions; do
    path=$(echo "$found" | sed -n "s|^$version ||p" | head -n 1)
    if [ -n "$path" ]; then
        echo "$path"
        exit 0
    fi
done

{
    echo "$wanted"
    echo "$found" | sed -n 's|^- |  |p'
    echo "Install Python 3.13 (on Debian and Ubuntu python3.13-venv too), or name one: make PYTHON=/path/to/python3"
} >&2
exit 1
