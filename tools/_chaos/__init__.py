"""The parts of tools/chaos, one noun per file.

user      somebody who types the launch command again whenever it is not running, and does nothing else
world     the sandbox, the run directory and what lies in them, as the gremlin sees them
faults    what can go wrong, each a function of the world and a seeded draw
gremlin   does these at random moments, and mends what a cluster's administrators would mend
rounds    an undisturbed run, the same run disturbed, and both compared
outcome   executions told by the accounting, and a run compared with an undisturbed one
"""
