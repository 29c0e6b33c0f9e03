#!/bin/sh
# A node of a Ray cluster, without usage reports and without the dashboard:
#   ray.sh head             in the foreground; the cluster's address is HOST:6379
#   ray.sh worker           in the foreground; of the cluster at $RAY_ADDRESS
#   ray.sh driver COMMAND…  a node that takes no task, in the background, then COMMAND on it
#   ray.sh health           exit status 0 while the cluster at $RAY_ADDRESS answers and this node runs
# $RAY_START_ARGS goes to `ray start`. $NODE_IP is where the other nodes reach this one; it is found where it is not set.
set -eu
export RAY_USAGE_STATS_ENABLED=0

need_address() { : "${RAY_ADDRESS:?set it to HOST:PORT of the cluster}"; }

# shellcheck disable=SC2086 # arguments are meant to be split
case "${1:-}" in
  head)
    exec ray start --head --block --include-dashboard=false --disable-usage-stats \
      --node-ip-address="${NODE_IP:-$(hostname -I | cut -d ' ' -f 1)}" ${RAY_START_ARGS:-}
    ;;
  worker)
    need_address
    exec ray start --address="$RAY_ADDRESS" --block ${NODE_IP:+--node-ip-address="$NODE_IP"} ${RAY_START_ARGS:-}
    ;;
  driver)
    need_address
    shift
    [ $# -gt 0 ] || { echo "ray.sh driver: give a command" >&2; exit 2; }
    ray start --address="$RAY_ADDRESS" --num-cpus=0 --num-gpus=0 ${NODE_IP:+--node-ip-address="$NODE_IP"} \
      ${RAY_START_ARGS:-} >&2
    exec "$@"
    ;;
  health)
    need_address
    ray health-check --address "$RAY_ADDRESS"
    test -S "${RAY_TMPDIR:-/tmp}/ray/session_latest/sockets/raylet"
    ;;
  *)
    echo "usage: ray.sh head|worker|driver COMMAND…|health" >&2
    exit 2
    ;;
esac
