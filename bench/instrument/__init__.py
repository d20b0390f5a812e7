"""What measures and knows no job: cases, workloads, the error rule, the timer, statistics, rows, races."""
