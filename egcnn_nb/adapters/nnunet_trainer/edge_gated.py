"""nnU-Net imports every module of this folder by its bare name, so it holds our trainer and nothing else."""

import egcnn_nb.adapters.nnunet as nnunet

nnUNetTrainerEGCNN = nnunet.nnUNetTrainerEGCNN
