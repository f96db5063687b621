#!/bin/sh
# A Slurm cluster of two nodes on this machine, from Debian's packages: a controller and two node daemons on loopback.
# In namespaces of its own, so that its names are known and everything ends with it; needs root:
#
#     unshare --mount --pid --fork --mount-proc --kill-child sh tests/slurm/cluster.sh FOLDER
set -eu
folder=$1
mkdir -p "$folder/state"
printf '127.0.0.1 localhost %s\n127.0.0.2 n01\n127.0.0.3 n02\n' "$(hostname)" > "$folder/hosts"
mount --make-rprivate /
mount --bind "$folder/hosts" /etc/hosts
head -c 128 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
    --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
cat > "$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n01 NodeHostname=n01 NodeAddr=127.0.0.2 Port=16819 CPUs=4 RealMemory=8000
NodeName=n02 NodeHostname=n02 NodeAddr=127.0.0.3 Port=16820 CPUs=4 RealMemory=8000
PartitionName=main Nodes=n01,n02 Default=YES State=UP
END
export SLURM_CONF="$folder/slurm.conf"
slurmctld -c
for node in n01 n02; do
    unshare --uts sh -c "hostname $node; exec slurmd -N $node"
done
exec sleep infinity
