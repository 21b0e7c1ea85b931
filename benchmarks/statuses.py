"""Exit statuses of the programs that gpu-session starts, beside 0 for done and 1 for failed."""

LEFT_OUT = 77  # this cannot run here, and the last line says why
AGAIN = 75  # start the same command again, and it goes on
TIME_OVER = 76  # the time was over before everything was done; what there is has been kept
