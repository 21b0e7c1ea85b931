"""Exit statuses of the programs that gpu-session starts, beside 0 for done and 1 for failed."""

LEFT_OUT = 77  # the program cannot run here; its last line says why
AGAIN = 75  # the same command, started again, continues
TIME_OVER = 76  # the time ended before everything was done; the results so far are kept
