#!/usr/bin/env bash
# Stops the cluster that up.sh FOLDER started, by the process ids it wrote down, each checked to be what it was.
LAB=$(cd "$1" && pwd) || exit 0
export SLURM_CONF=$LAB/slurm.conf
timeout 20 scancel --user="$(id -un)" 2>/dev/null && sleep 2
for file in "$LAB"/run/slurmd.*.pid "$LAB/run/slurmctld.pid" "$LAB/run/munged.pid"; do
  pid=$(cat "$file" 2>/dev/null) || continue
  name=$(basename "$file" | cut -d. -f1)
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$name" ] || continue
  tr '\0' '\n' <"/proc/$pid/cmdline" | grep -qF "$LAB/" || continue
  kill "$pid"
  for _ in $(seq 100); do [ -d "/proc/$pid" ] && sleep 0.1 || break; done
done
exit 0
