#!/bin/bash
# raw.sh WORK SIZE PAYLOAD: the missing shards of both stages as two arrays; returns when they have been sent.
set -euo pipefail
work=$1 size=$2 payload=$3
missing() { # missing STAGE: indices without output, for --array
  local index list=()
  for ((index = 0; index < size; index++)); do
    [ -e "$work/out/$1/$index" ] || list+=("$index")
  done
  (IFS=,; echo "${list[*]-}")
}
ranges() { # ranges INDICES: the same with 3-7 for 3,4,5,6,7; sbatch takes only so many characters
  tr , '\n' <<<"$1" | awk 'function put(end) { printf "%s%s", a == b ? a : a "-" b, end }
    NR == 1 { a = b = $1; next } $1 == b + 1 { b = $1; next } { put(","); a = b = $1 } END { put("\n") }'
}
send() { # send STAGE INDICES [OPTION...]
  local stage=$1 indices=$2
  shift 2
  sbatch --parsable --job-name=raw --output=/dev/null --time=10 --mem=100 --array="$(ranges "$indices")" "$@" \
    --wrap="exec python3 $payload $work $stage \$SLURM_ARRAY_TASK_ID"
}
first=$(missing 1) second=$(missing 2)
if [ -n "$first" ]; then
  id=$(send 1 "$first")
  # Those whose input is there already need not wait; an index without a partner would wait for ever.
  rest=$(comm -23 <(tr , '\n' <<<"$second" | sort) <(tr , '\n' <<<"$first" | sort) | sort -n | paste -sd,)
  [ -z "$rest" ] || send 2 "$rest"
  send 2 "$first" --dependency="aftercorr:$id" --kill-on-invalid-dep=yes
elif [ -n "$second" ]; then
  send 2 "$second"
fi
