#!/usr/bin/env bash
# A suite as a Slurm array: every task runs its part of the cases and writes a file of its own.
#
#   mkdir -p results
#   sbatch deploy/slurm-array.sh configs/four-models.toml results
#   quantbench merge results/part-*-of-4.jsonl -o results.jsonl   # when all tasks have ended
#
# The number of parts stands twice below, in --array and in parts: change both. Some tasks alone, such as those that failed, are
# `sbatch --array=3 deploy/slurm-array.sh …`: a part stays the same whichever tasks run. A task that was killed or requeued goes on
# where it ended; options behind the folder are those of `quantbench suite`, such as `--retry-failed`. Add what your cluster asks
# for, such as `--partition`, `--gres=gpu:1` or `--time`, to the command.
#SBATCH --job-name=quantbench
#SBATCH --array=1-4
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=quantbench-%A-%a.log
set -euo pipefail
parts=4

usage='usage: sbatch slurm-array.sh SUITE.toml FOLDER [OPTION …]'
suite=${1:?$usage}
folder=${2:?$usage}
part=${SLURM_ARRAY_TASK_ID:?$usage}
quantbench=${QUANTBENCH:-quantbench}

exec "$quantbench" suite "$suite" --shard "$part/$parts" --resume -o "$folder/part-$part-of-$parts.jsonl" "${@:3}"
