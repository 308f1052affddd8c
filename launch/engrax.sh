# Sourced by the launchers with `checkout` set: `engrax` becomes the program to start. An environment variable ENGRAX
# wins, then the checkout's own .venv (`make train` and `launch/venv.sh` make it), then what PATH has.
engrax="${ENGRAX:-}"
if [ -z "$engrax" ] && [ -x "$checkout/.venv/bin/engrax" ]; then
    engrax="$checkout/.venv/bin/engrax"
fi
engrax="${engrax:-$(command -v engrax || true)}"
if [ -z "$engrax" ]; then
    echo "engrax is not installed: run \`sh launch/venv.sh .venv cuda\` in $checkout, or set ENGRAX to the program." >&2
    exit 2
fi
