"""What `torchrun -m egcnn_nb.train` starts, as job scripts do; the command is in `egcnn_nb.commands.train`."""
import sys

from .commands.train import main

if __name__ == "__main__":
    sys.exit(main())
