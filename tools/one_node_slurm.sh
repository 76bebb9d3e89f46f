#!/usr/bin/env bash
# A Slurm cluster of this one machine, to test or try a sweep on: tools/one_node_slurm.sh up | down
# Needs root and the packages slurm-wlm and munge. A machine that belongs to a cluster already is left alone.
set -euo pipefail
conf=/etc/slurm/slurm.conf
run=/run/growconv-slurm # pid files, logs and state: gone with the machine
mark="# written by one_node_slurm.sh"

alive() { [ -f "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

write_conf() {
    local host cpus megabytes
    host=$(hostname -s)
    cpus=$(nproc)
    megabytes=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    cat >"$conf" <<CONF
$mark
ClusterName=growconv_one_node
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
# A job that is sent back to the queue starts again after this many seconds, not after two minutes.
AuthInfo=cred_expire=5
SlurmUser=root
# Neither cgroups nor accounting: both are often missing, in containers as on small clusters.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
SlurmctldPidFile=$run/slurmctld.pid
SlurmdPidFile=$run/slurmd.pid
SlurmctldLogFile=$run/slurmctld.log
SlurmdLogFile=$run/slurmd.log
StateSaveLocation=$run/state
SlurmdSpoolDir=$run/spool
ReturnToService=2
KillWait=15
# Such a job waits for the main loop of the scheduler, which comes every two seconds, not every sixty.
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# More than a small machine has: tests run side by side, and a job may wait for jobs of its own.
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((cpus > 4 ? cpus : 4)) RealMemory=$megabytes
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}

up() {
    if [ -f "$conf" ] && ! grep -qxF "$mark" "$conf"; then
        echo "$conf is not this script's: nothing started"
        return
    fi
    mkdir -p "$run"/{state,spool,munge} /run/munge
    write_conf
    if [ ! -f /etc/munge/munge.key ]; then
        (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
    fi
    chown -R munge:munge /etc/munge /run/munge "$run/munge"
    chmod 755 /run/munge
    # One that the system started serves as well, and is not stopped by `down`.
    alive /run/munge/munged.pid || alive "$run/munge/pid" || runuser -u munge -- munged --pid-file="$run/munge/pid"
    alive "$run/slurmctld.pid" || slurmctld
    alive "$run/slurmd.pid" || slurmd
    for _ in $(seq 30); do
        if srun --ntasks=1 true 2>/dev/null; then
            sinfo
            return
        fi
        sleep 1
    done
    echo "the node does not answer; see $run/*.log" >&2
    return 1
}

down() {
    for name in slurmd.pid slurmctld.pid munge/pid; do
        if alive "$run/$name"; then
            kill "$(cat "$run/$name")"
        fi
    done
}

case "${1:-}" in
up | down) "$1" ;;
*) echo "usage: $0 up | down" >&2 && exit 2 ;;
esac
