"""The text of every configuration file, as pure functions of the folder."""

from _sandbox.folder import Folder

CLUSTER = "sandbox"
GPUS_PER_NODE = 8
CPUS_PER_NODE = 8
MEGABYTES_PER_NODE = 4000


def slurm_conf(folder: Folder) -> str:
    settings, ports = folder.settings, folder.ports
    nodes = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[name]}"
        f" CPUs={CPUS_PER_NODE} RealMemory={MEGABYTES_PER_NODE} Gres=gpu:{GPUS_PER_NODE}"
        for name in settings.node_names
    )
    accounting = "AccountingStorageType=accounting_storage/none"
    if settings.accounting:
        accounting = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={ports["slurmdbd"]}
AccountingStoragePass={folder.munge_socket}
AccountingStorageTRES=gres/gpu"""
        if settings.enforce_limits:
            accounting += "\nAccountingStorageEnforce=limits"
    task_plugin, consumable, memory = "task/none", "CR_Core", ""
    if settings.enforce_memory:
        task_plugin, consumable = "task/cgroup", "CR_Core_Memory"
        # A job that asks for none would get all of a node.
        memory = f"\nDefMemPerCPU={MEGABYTES_PER_NODE // CPUS_PER_NODE}"
    return f"""\
ClusterName={CLUSTER}
SlurmctldHost=localhost
SlurmctldPort={ports["slurmctld"]}
SlurmUser=root
SlurmdUser=root

AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s).
AuthInfo=socket={folder.munge_socket},cred_expire=15

StateSaveLocation={folder.root}/state
SlurmctldPidFile={folder.run}/slurmctld.pid
SlurmdSpoolDir={folder.run}/%n
SlurmdPidFile={folder.run}/slurmd-%n.pid
SlurmdLogFile={folder.root}/logs/steps-%n.log

ProctrackType=proctrack/linuxproc
TaskPlugin={task_plugin}
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
MailProg=/bin/true

SelectType=select/cons_tres
SelectTypeParameters={consumable}{memory}
GresTypes=gpu
# Nodes may claim more CPUs than the machine has.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
# Without these a job waits a second or more before anything looks at it.
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1

ReturnToService=2
KillWait=5
SlurmdTimeout={settings.slurmd_timeout}
SlurmctldTimeout=30
MinJobAge={settings.min_job_age}
MaxArraySize={settings.max_array_size}

{accounting}

{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=01:00:00 MaxTime=1-00:00:00 PriorityTier=1
PartitionName=short Nodes=ALL DefaultTime=00:05:00 MaxTime=00:05:00 PriorityTier=1
PartitionName=urgent Nodes=ALL DefaultTime=01:00:00 MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF
"""


def gres_conf(folder: Folder) -> str:
    # A bare Count is refused; with files the jobs get real CUDA_VISIBLE_DEVICES bindings.
    return f"AutoDetect=off\nName=gpu File={folder.root}/dev/nvidia[0-{GPUS_PER_NODE - 1}]\n"


def cgroup_conf(folder: Folder, limits_swap: bool) -> str:
    return f"""\
CgroupPlugin=cgroup/v1
CgroupMountpoint={folder.root}/cgroup
ConstrainRAMSpace=yes
ConstrainSwapSpace={"yes" if limits_swap else "no"}
"""


def slurmdbd_conf(folder: Folder, password: str) -> str:
    return f"""\
DbdHost=localhost
DbdPort={folder.ports["slurmdbd"]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder.munge_socket}
PidFile={folder.run}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={folder.ports["mariadbd"]}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
"""


def accounts_sql(password: str) -> str:
    # MariaDB runs an init file line by line.
    return (
        "CREATE DATABASE IF NOT EXISTS slurm_acct_db;\n"
        f"CREATE OR REPLACE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
        f"CREATE OR REPLACE USER 'slurm'@'localhost' IDENTIFIED BY '{password}';\n"
        "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';\n"
        "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';\n"
    )
