# CPU:  docker build --tag egcnn_nb .
#       docker run --rm -p 127.0.0.1:8888:8888 -v /your/data:/data:ro egcnn_nb
# GPU:  docker build --tag egcnn_nb:gpu --build-arg TORCH_FROM= .    # the standard index has torch for CUDA
#       docker run --rm --gpus all -p 127.0.0.1:8888:8888 -v /your/data:/data:ro egcnn_nb:gpu
FROM python:3.11-slim
ARG TORCH_FROM="--index-url https://download.pytorch.org/whl/cpu"
# Chromium for the tests, since the user below may not install it; elsewhere tools/browser.py gets one
RUN apt-get update && apt-get install --yes --no-install-recommends chromium git make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home reader
RUN pip install --no-cache-dir $TORCH_FROM torch==2.13.0
WORKDIR /home/reader/egcnn_nb
COPY --chown=reader . .
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[dev]'
USER reader
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--notebook-dir=nbs"]
