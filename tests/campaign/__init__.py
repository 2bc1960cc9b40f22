"""Hard days, drawn at random: kills, damaged files, wrong recipes and command lines, each judged against an undisturbed run.

    python -m tests.campaign --minutes 10 [--seed N]          trials of all kinds in turn until the time is over
    python -m tests.campaign --kind training --count 50       so many trials of one kind
    python -m tests.campaign --seed N --trial training-17     one trial again

All that a trial does at random is drawn from the seed, its kind and its number. A kill's moment is counted from the command's start or
from the appearance of a file, so that the same trial may meet the run a few milliseconds earlier or later.
"""
