# Settings of a chain of Slurm jobs: copy this file, edit it, and run deploy/slurm/submit.sh FILE.
# The jobs keep these values from their submission on, also when they are requeued.

# Where the programs are: a virtual environment on a disk that all nodes share. Or a container: see docs/slurm.md.
PATH=/shared/dcgan/.venv/bin:$PATH

# data: from pictures to shards. All paths are on a disk that the nodes share, or URLs such as s3://bucket/data.
SOURCE_KIND=folder # folder, lsun, webdataset, ...: dcgan-data build --help
SOURCE=/shared/pictures
SIZE=64 # pixels
ENCODING=packed
DATA=/shared/data
DATA_PARTS=4 # tasks of the array

# train
RUN=/shared/run # checkpoints, samples, metrics
MIRROR= # s3://bucket/run: gets a copy of the checkpoints
PRESET=tutorial64
MIXED_PRECISION=no # no, bf16, fp16
TRAIN_SETTINGS="recipe.batch=128 schedule.total_images=2000000 schedule.checkpoint_minutes=10"

# export
CKPT=$RUN # a run, its MIRROR, RUN@best
MODEL=/shared/model # the folder of model.onnx

# generate
COUNT=100000
SEED=0
FORMAT=webp # packed, jpg, png, webp
SHARD_IMAGES=2048 # images in a shard: a killed task loses up to five shards
SAMPLES=/shared/samples
PARTS=4 # tasks of the array

# What each job asks for, as options of sbatch: partition, account, time, memory. Training: one task on each node,
# which starts a process for each of its GPUs: --gpus-per-node=8.
DATA_JOB="--cpus-per-task=2"
TRAIN_JOB="--nodes=2 --cpus-per-task=2"
EXPORT_JOB="--cpus-per-task=2"
GENERATE_JOB="--cpus-per-task=2"
