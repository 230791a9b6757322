"""``python -m unlearn.cli`` (and ``torchrun -m unlearn.cli``)."""

from unlearn.cli.main import main

main()
