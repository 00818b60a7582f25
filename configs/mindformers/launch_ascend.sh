#!/bin/sh
# Trains a MindFormers YAML on Ascend devices with msrun, data parallel. No NPU has run this yet.
#
#   sh configs/mindformers/launch_ascend.sh CONFIG.yaml [section.key=value …]
#
# On several machines, the same command on each, with:
#   NODES      number of machines (default 1)
#   NODE_RANK  this machine's number, from 0 (default 0)
#   DEVICES    devices of one machine (default 8)
#   MASTER     address of machine 0, and MASTER_PORT a port that is free there (defaults 127.0.0.1 and 8118)
#   LOGS       folder of the processes' logs (default msrun_log)
set -eu
[ $# -ge 1 ] || { echo "usage: sh $0 CONFIG.yaml [section.key=value …]" >&2; exit 2; }
devices=${DEVICES:-8}
exec msrun --worker_num=$((${NODES:-1} * devices)) --local_worker_num="$devices" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER:-127.0.0.1}" --master_port="${MASTER_PORT:-8118}" --log_dir="${LOGS:-msrun_log}" \
    --join=True --cluster_time_out=600 python -m pangu_sigma mindformers "$@"
