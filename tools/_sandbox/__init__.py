"""The parts of tools/slurm_sandbox, one noun per file.

errors    the one exception shown to the user
packages  the Debian packages, installed when they are missing
process   a process that can be named again safely; starting, finding and stopping them
folder    the sandbox's folder: its tree, its settings and ports, its lock
cgroups   the memory cgroup of a sandbox that enforces memory limits
config    the text of every configuration file, as pure functions
cluster   the daemons in order: start, stop, status
"""
