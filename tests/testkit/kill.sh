# Sourced by tests/fault/*_kill.sh. kill_loop kills a program at seeded moments, lets it go on, and compares what it leaves with an undisturbed run.
#   LSA_KILLS=N   another number of kills        LSA_SEED=N   another sequence
# The caller sets: work (folder; kill_loop uses $work/killed), span (microseconds an undisturbed run takes), and the functions
#   command_line   sets cmd to what starts the run, or goes on with it
#   left_behind    prints the hashes of what lies in $work/killed; $work/want holds those of the undisturbed run
kills=${LSA_KILLS:-30}

kill_loop() { # seed, what
    local round=0 part pid us
    landed=0
    RANDOM=$1
    echo "seed $1: $kills kills in runs of $((span / 1000)) ms, $(wc -l <"$work/want") files"
    while [ "$landed" -lt "$kills" ]; do
        round=$((round + 1))
        [ "$round" -le $((kills * 3)) ] || { echo "only $landed of $kills kills landed"; exit 1; }
        rm -rf "$work/killed"
        for part in 1 2 3; do # up to three kills a run: the first in run, the next in resume
            command_line
            "${cmd[@]}" >/dev/null 2>&1 &
            pid=$!
            us=$(((RANDOM * 32768 + RANDOM) % span))
            sleep "$(printf '%d.%06d' $((us / 1000000)) $((us % 1000000)))"
            if kill -KILL $pid 2>/dev/null; then landed=$((landed + 1)); fi
            wait $pid 2>/dev/null || true
        done
        command_line
        "${cmd[@]}" >"$work/log" 2>&1 || { echo "round $round: resume failed"; cat "$work/log"; exit 1; }
        left_behind >"$work/got"
        if ! diff "$work/want" "$work/got"; then
            echo "round $round (LSA_SEED=$1 bash $0): $2 differ from the undisturbed run"
            exit 1
        fi
    done
    echo "ok: $landed kills in $round runs, $2 equal those of the undisturbed run every time"
}
