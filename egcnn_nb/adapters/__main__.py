"""Print the folder in which nnU-Net finds our trainer: `export nnUNet_extTrainer=$(python -m egcnn_nb.adapters)`."""

from pathlib import Path

if __name__ == "__main__":
    print(Path(__file__).parent / "nnunet_trainer")
