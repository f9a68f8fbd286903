"""`python -m headwater`, which is also what torchrun starts: `torchrun --nproc-per-node 2 -m headwater train FILE`."""

from headwater.cli import main

main()
