"""What `torchrun -m egcnn_nb.train` starts. Job scripts use this name; the command itself is `egcnn_nb.commands.train`."""
import sys

from .commands.train import main

if __name__ == "__main__":
    sys.exit(main())
