#!/bin/sh
# Makes an environment with engrax installed editable, or refreshes it; does nothing when it is up to date.
#
#   launch/venv.sh FOLDER EXTRA [PYTHON]     EXTRA: an extra of setup.py ("" = none); PYTHON: see launch/python.sh
#   launch/venv.sh --lowest FOLDER EXTRA     Python 3.11 and the lowest versions that setup.py allows
set -eu
cd "$(dirname "$0")/.."

lowest=
if [ "$1" = "--lowest" ]; then
    lowest=yes
    shift
    set -- "$1" "$2" 3.11
fi
folder=$1
extra=$2
python=${3:-}

base() { "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null | head -n 1; }

# An environment is made anew when it does not run, was moved, or another Python is asked for.
fresh=
[ "$(cat "$folder/.checkout" 2>/dev/null)" = "$PWD" ] && [ -n "$(base "$folder/bin/python")" ] || fresh=yes
if [ -n "$fresh$python" ]; then
    chosen=$(sh launch/python.sh ${python:+"$python"})
    [ "$(base "$folder/bin/python")" = "$(base "$chosen")" ] || fresh=yes
fi
if [ -n "$fresh" ]; then
    echo "Making $folder with $chosen"
    "$chosen" -m venv --clear "$folder"
    echo "$PWD" >"$folder/.checkout"
fi

# Installed again when what setup.py asks for has changed.
asked=$(cat setup.py pyproject.toml | cksum)
if [ "$(cat "$folder/.installed-$extra" 2>/dev/null)" != "$asked" ]; then
    echo "Installing engrax${extra:+[$extra]} and what it needs into $folder"
    if [ -n "$lowest" ]; then
        "$folder/bin/python" launch/minimums.py >"$folder/minimums.txt"
        set -- -r "$folder/minimums.txt"
    else
        set --
    fi
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@" --editable ".${extra:+[$extra]}"
    echo "$asked" >"$folder/.installed-$extra"
    echo "$asked" >"$folder/.installed-"
fi
