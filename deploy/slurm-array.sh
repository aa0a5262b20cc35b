#!/usr/bin/env bash
# A suite as a Slurm array: every task runs its part of the cases and writes a file of its own.
#
#   mkdir -p results
#   sbatch --array=1-4 deploy/slurm-array.sh configs/seed.toml results
#   quantbench merge results/*.jsonl -o results.jsonl   # when all tasks have ended
#
# A task that was killed or requeued goes on where it ended: submit the same array again. Add what your cluster asks for, such
# as `--partition`, `--gres=gpu:1` or `--time`, to the command.
#SBATCH --job-name=quantbench
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=quantbench-%A-%a.log
set -euo pipefail

suite=${1:?usage: sbatch --array=1-N slurm-array.sh SUITE.toml FOLDER}
folder=${2:?usage: sbatch --array=1-N slurm-array.sh SUITE.toml FOLDER}
quantbench=${QUANTBENCH:-quantbench}

# The part is read from SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT.
exec "$quantbench" suite "$suite" --resume -o "$folder/part-$SLURM_ARRAY_TASK_ID.jsonl"
