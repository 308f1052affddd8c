#!/usr/bin/env bash
# Trains on one machine, on all the devices that JAX sees there.
#
#   launch/local.sh CONFIG [flags of `engrax train`]
#   CUDA_VISIBLE_DEVICES=0,1 launch/local.sh quickstart --run-dir runs/a --parallel.fsdp 2 --parallel.zero 3
#   DEVICES=8 launch/local.sh quickstart --steps 20     # eight virtual CPU devices, to try a mesh out
#   PROCESSES=2 launch/local.sh quickstart --steps 20   # two processes, started again after a death (`engrax launch`)
#
# One process drives all devices, or PROCESSES share them; DEVICES is then the number of each. The batch is split over
# all devices; `--parallel.*` says what else is.
set -euo pipefail
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$checkout/launch/engrax.sh"

if [ -n "${DEVICES:-}" ]; then
    export JAX_PLATFORMS=cpu
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi
if [ -n "${PROCESSES:-}" ]; then
    exec "$engrax" launch "$@" --processes "$PROCESSES"
fi
exec "$engrax" train "$@"
