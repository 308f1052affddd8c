#!/usr/bin/env bash
# Trains on a Cloud TPU slice of one or more hosts. Runs on your own machine, which needs `gcloud`, logged in:
#
#   launch/tpu_pod.sh TPU_NAME ZONE CONFIG --run-dir gs://BUCKET/RUN [flags of `engrax train`]
#
# Copies this checkout (as git knows it) to every host, installs it there, and starts one process per host. When they
# end with an error (a host was restarted, the network failed, the slice was preempted) it waits for the slice to be
# READY and starts them again: the run folder in the bucket makes that a resumption. What would end the same way again
# is not tried again: exit codes 2 (refused), 3 (no sound checkpoint) and 4 (diverged). Variables: RETRIES (default 20),
# WAIT (seconds between tries, default 60). Every host keeps the output of its process in engrax/logs.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n 's/^#   //p' "$0" >&2
    exit 2
fi
name=$1
zone=$2
shift 2
case " $* " in
    *" --run-dir gs://"* | *" --run-dir=gs://"*) ;;
    *) echo "name a run folder in a bucket with --run-dir gs://BUCKET/RUN: every host writes to it." >&2; exit 2 ;;
esac

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
tries="${RETRIES:-20}"
wait="${WAIT:-60}"

archive="$(mktemp)"
trap 'rm -f "$archive" "$archive.tar.gz"' EXIT

tpu() { gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"; }
on_all_hosts() { tpu ssh --worker=all --command="$1"; }
state() { tpu describe --format='value(state)' 2>/dev/null || echo UNKNOWN; }

existing() { while IFS= read -r -d '' file; do if [ -f "$file" ]; then printf '%s\0' "$file"; fi; done; }

install() {
    # What git knows, as it stands in the working tree: uncommitted changes are part of an experiment.
    (cd "$checkout" && git ls-files -z --cached --others --exclude-standard | existing |
        tar --null --files-from=- -czf "$archive.tar.gz") &&
        gcloud compute tpus tpu-vm scp "$archive.tar.gz" "$name:engrax.tar.gz" --zone="$zone" --worker=all &&
        on_all_hosts 'set -e
mkdir -p engrax && tar -xzf engrax.tar.gz -C engrax && cd engrax
# The images of older TPU VMs have Python 3.10.
sh launch/python.sh >/dev/null 2>&1 || { sudo apt-get update -q && sudo apt-get install -qy python3.11 python3.11-venv; }
sh launch/venv.sh .venv tpu'
}

# The lock makes a new process wait for one that a broken connection left behind, and that still holds the chips.
train() {
    on_all_hosts "cd engrax && ENGRAX_DISTRIBUTED=1 flock --wait 600 .venv/lock .venv/bin/engrax launch$(printf ' %q' "$@" --restarts 0)"
}

installed=
for ((try = 1; try <= tries; try++)); do
    found=$(state)
    if [ "$found" != READY ]; then
        echo "try $try of $tries: $name is $found, not READY; looking again in $wait s." >&2
        installed= # a slice created again has empty disks
        sleep "$wait"
        continue
    fi
    if [ -z "$installed" ]; then
        install || { echo "try $try of $tries: installing on $name failed; again in $wait s." >&2; sleep "$wait"; continue; }
        installed=yes
    fi
    code=0
    train "$@" || code=$?
    case $code in
        0) exit 0 ;;
        2 | 3 | 4) echo "exit code $code (see above): it would end the same way again; not trying." >&2; exit "$code" ;;
        *) echo "try $try of $tries: training ended early ($code); resuming in $wait s." >&2; sleep "$wait" ;;
    esac
done
echo "gave up after $tries tries; the same command resumes the run." >&2
exit 1
