#!/bin/sh
# The demo on a cluster: a raw bucket on s3://, its shards, made and checked on Ray, and a short pretraining from them.
# It may be run again: each step goes on from what it finds. Arguments are settings of the pretraining (section.key=value).
set -eu
: "${DEMO_RAW:=s3://raw/demo}" "${DEMO_SHARDS:=s3://shards/demo}" "${DEMO_OUT:=/results/demo}" "${DEMO_STEPS:=60}"
: "${RAY_ADDRESS:?set it to HOST:PORT of the cluster}"

step() {
  printf "\n== %s\n" "$*" >&2
  "$@"
}
step python "$(dirname "$0")/demo_bucket.py" "$DEMO_RAW" "$DEMO_SHARDS"
step reelmae doctor "$DEMO_SHARDS"
step reelmae shard "$DEMO_RAW" "$DEMO_SHARDS" --labels folder --runner ray --ray-address "$RAY_ADDRESS"
step reelmae verify "$DEMO_SHARDS" --deep --runner ray --ray-address "$RAY_ADDRESS"
step reelmae pretrain demo data.url="$DEMO_SHARDS" run.out="$DEMO_OUT" run.steps="$DEMO_STEPS" "$@"
