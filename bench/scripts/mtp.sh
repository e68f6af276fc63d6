#!/usr/bin/env bash
# What drafting with the MTP module is worth here: two clusters of the demo model on this machine, with and without, asked in turn.
#
#   bench/scripts/mtp.sh [TRIREME [ROUNDS [FLAGS OF up...]]]      default: target/release/trireme, 3 rounds
#
# CLIENTS (1,8,32), REQUESTS (48) and PROMPTS (text) in the environment say what is asked.
#
# Prints output tokens/s at so many clients, medians with their spread, what a round with gave as a share of the one
# without beside it, and which share of the first, second and third drafts stood. Every round has prompts of its own, so that
# none is answered from a cache, and the two take turns at being first: a shared host's speed drifts. Both clusters stay up all the
# while; an idle one takes 1 % of a core.
set -euo pipefail

trireme=${1:-target/release/trireme}
rounds=${2:-3}
flags=("${@:3}")
clients=${CLIENTS:-1,8,32}
work=$(mktemp -d)
declare -A port=([auto]=18410 [off]=18420)
pids=()
trap 'kill -INT "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$work"' EXIT

for mtp in auto off; do
    "$trireme" up --quiet --port "${port[$mtp]}" --mtp "$mtp" "${flags[@]}" > "$work/$mtp.log" 2>&1 &
    pids+=($!)
done
for mtp in auto off; do
    for _ in $(seq 200); do
        grep -q '^Ctrl-C' "$work/$mtp.log" && break
        sleep 0.1
    done
    grep -q '^Ctrl-C' "$work/$mtp.log" || { cat "$work/$mtp.log"; exit 1; }
done

for round in $(seq "$rounds"); do
    order="auto off"
    [ $((round % 2)) = 1 ] || order="off auto"
    for mtp in $order; do
        "$trireme" bench serve --seed "$round" --url "http://127.0.0.1:${port[$mtp]}" --concurrency "$clients" --requests "${REQUESTS:-48}" \
            --prompt-kind "${PROMPTS:-text}" --json "$work/$mtp.$round.json" > "$work/out" 2>&1 || { cat "$work/out"; exit 1; }
    done
done

# A figure of each load point, one a line, in the order of the file.
figures() { tr ',{' '\n\n' < "$1" | sed -n "s/^ *\"$2\": *\([0-9.]*\).*/\1/p"; }
# Median and range of standard input.
spread() { sort -g | awk '{ v[NR] = $1 } END { printf "%.4g (%.4g to %.4g)", v[int((NR + 1) / 2)], v[1], v[NR] }'; }

point=0
for count in ${clients//,/ }; do
    point=$((point + 1))
    for mtp in auto off; do
        rates=$(for r in $(seq "$rounds"); do figures "$work/$mtp.$r.json" output_tokens_per_s | sed -n "${point}p"; done)
        echo "clients $count, mtp $mtp: $(echo "$rates" | spread) output tokens/s"
        printf -v "$mtp" %s "$rates"
    done
    echo "clients $count, with / without: $(paste <(echo "$auto") <(echo "$off") | awk '{ print $1 / $2 }' | spread)"
done
state=$(sed -n 's/.*configuration: *\([^ ,]*\).*/\1/p' "$work/auto.log" | head -n 1)
admin=$(awk '/^id = "decode-0"/ { found = 1 } found && /^admin = / { gsub(/[" ]/, "", $3); print $3; exit }' "$state"/*.toml "$state" 2>/dev/null | head -n 1)
curl -s "http://$admin/metrics" | awk -F'[{}" ]+' '
    /^decode_(drafted|accepted)_tokens_total/ { split($1, name, "_"); count[name[2], $3] = $NF }
    END { for (p = 1; p <= 3; p++) if (count["drafted", p]) printf "draft %d: %d of %d stood (%.1f %%)\n", p, count["accepted", p], count["drafted", p], 100 * count["accepted", p] / count["drafted", p] }'
