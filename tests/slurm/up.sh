#!/usr/bin/env bash
# Starts a real SLURM cluster of three pretended nodes on this machine, without systemd, cgroups or accounting (and so
# without sacct). Usage: up.sh FOLDER; then: export SLURM_CONF=FOLDER/slurm.conf. Exits with 77 where there can be none.
set -euo pipefail
LAB=$(mkdir -p "$1" && cd "$1" && pwd)
PORT=${SLURM_TEST_PORT:-36817} # of slurmctld; the nodes take the next ones

if ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "skipped: SLURM is not installed here, and only root can install it (Debian: slurmctld slurmd slurm-client munge)"
    exit 77
  fi
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null; } || {
    echo "skipped: SLURM is not installed here, and its packages cannot be had"
    exit 77
  }
fi
if [ "$(id -u)" != 0 ]; then
  echo "skipped: the daemons of SLURM need root"
  exit 77
fi

mkdir -p "$LAB"/{munge,state,spool/node1,spool/node2,spool/node3,log,run,dev}
chmod 700 "$LAB/munge" "$LAB/state"
chmod 755 "$LAB" "$LAB/run"
(umask 077 && head -c 1024 /dev/urandom >"$LAB/munge/munge.key")
for i in 0 1; do # a pretended GPU is a character device: another name of /dev/null
  [ -c "$LAB/dev/nvidia$i" ] || mknod "$LAB/dev/nvidia$i" c 1 3 || { echo "skipped: mknod is forbidden here"; exit 77; }
done

cat >"$LAB/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$LAB/run/munge.socket
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
MaxArraySize=4
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_min_interval=1,bf_interval=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node[1-3] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + 3))] CPUs=4 CoresPerSocket=4 Sockets=1 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=1-0 State=UP PriorityTier=10 PreemptMode=OFF
CONF
printf 'AutoDetect=off\nNodeName=node[1-3] Name=gpu File=%s/dev/nvidia[0-1]\n' "$LAB" >"$LAB/gres.conf"
export SLURM_CONF=$LAB/slurm.conf

munged --key-file="$LAB/munge/munge.key" --socket="$LAB/run/munge.socket" --pid-file="$LAB/run/munged.pid" \
  --log-file="$LAB/log/munged.log" --seed-file="$LAB/munge/munged.seed" --num-threads=2 --force 2>>"$LAB/log/munged.err"
slurmctld -f "$SLURM_CONF"
for node in node1 node2 node3; do slurmd -f "$SLURM_CONF" -N "$node"; done
for _ in $(seq 150); do
  [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" = 3 ] && exit 0
  sleep 0.2
done
echo "the nodes did not come up; see $LAB/log" >&2
exit 1
