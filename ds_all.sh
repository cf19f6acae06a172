#!/bin/sh
# Fine-tune on every GPU of this host, or of several hosts, with DeepSpeed ZeRO-2 or ZeRO-3.
#   sh ds_all.sh                                     bloom-560m on data_proj/opendata, every GPU, ZeRO-2
#   MODEL=bigscience/bloom-7b1 OUTPUT=output_dir/bloom-7b1 ZERO_STAGE=3 NUM_GPUS=4 sh ds_all.sh
#   MODEL=tiiuae/falcon-7b DATA=my_rows OUTPUT=output_dir/mine sh ds_all.sh --num_train_epochs 1
#   ZERO_STAGE=auto sh ds_all.sh                     the stage and offload that --plan finds to fit
#   OFFLOAD=optimizer sh ds_all.sh                   optimizer states in the host's memory
#   ZERO_STAGE=3 OFFLOAD=all sh ds_all.sh            the weights too; with OFFLOAD_DIR=nvme_folder, in files there
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 sh ds_all.sh       on each of two hosts, with its own NODE_RANK
#   HOSTFILE=hosts sh ds_all.sh                      from one host by ssh; lines "host slots=8"; same paths on all hosts
#   DEVICE=cpu NUM_GPUS=2 sh ds_all.sh               two ranks on the CPU, to try things out
# SIGTERM, or a closing terminal, saves at the next step and ends with exit code 75; what has not ended GRACE_SECONDS
# (25) later is killed.
line_ends=LF
[ "$line_ends" = LF ] || { printf '%s\n' "error: $0 has Windows line ends; type sed -i 's/\r\$//' *.sh" >&2; exit 2; } #
set -eu
here=$(CDPATH="" cd "$(dirname "$(readlink -f "$0")")" && pwd)
. "$here/setup.sh"
set_up "$here/requirements.txt"

# Threads that wait for work soon sleep: else, on a busy machine, they keep the cores from those that they wait for.
[ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"

# On a CPU, huge pages for PyTorch's big tensors: fewer page faults.
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"

export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
if [ "${DEVICE:-gpu}" = cpu ]; then
    export DS_ACCELERATOR=cpu
    set -- --use_cpu True "$@"
fi
if [ -n "${HOSTFILE:-}" ]; then
    launch="-m deepspeed.launcher.runner --hostfile $HOSTFILE --no_local_rank --master_port ${MASTER_PORT:-29500}"
    launch="$launch${NUM_GPUS:+ --num_gpus $NUM_GPUS}${MASTER_ADDR:+ --master_addr $MASTER_ADDR}"
else
    launch="-m sft.training.launch --nnodes ${NNODES:-1} --node_rank ${NODE_RANK:-0}${NUM_GPUS:+ --ranks $NUM_GPUS}"
    launch="$launch${MASTER_ADDR:+ --master_addr $MASTER_ADDR}${MASTER_PORT:+ --master_port $MASTER_PORT}"
    [ "${DEVICE:-gpu}" != cpu ] || launch="$launch --cpu"
fi
[ -z "${OFFLOAD_DIR:-}" ] || set -- --offload_dir "$OFFLOAD_DIR" "$@"

stage=${ZERO_STAGE:-2} offload=${OFFLOAD:-none} checkpointing=True
if [ "$stage" = auto ]; then
    chosen=$("$PYTHON" "$here/train_sft.py" \
        --model_name_or_path "${MODEL:-bigscience/bloom-560m}" \
        --data_path "${DATA:-$here/data_proj/opendata}" \
        --output_dir "${OUTPUT:-output_dir/bloom-560m-zero}" \
        --plan True --plan_for_shell True ${NUM_GPUS:+--plan_ranks "$NUM_GPUS"} "$@")
    read -r stage offload checkpointing <<WORDS
$chosen
WORDS
    echo "ZERO_STAGE=$stage OFFLOAD=$offload, activation checkpointing $checkpointing: the fastest that fits (--plan)"
fi

# $launch is several words.
# shellcheck disable=SC2086
exec "$PYTHON" $launch "$here/train_sft.py" \
    --model_name_or_path "${MODEL:-bigscience/bloom-560m}" \
    --data_path "${DATA:-$here/data_proj/opendata}" \
    --output_dir "${OUTPUT:-output_dir/bloom-560m-zero$stage}" \
    --deepspeed "$here/ds_zero${stage}_config.json" \
    --offload "$offload" \
    --num_train_epochs 3 \
    --model_max_length 2048 \
    --packing True \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --activation_checkpointing "$checkpointing" \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 2 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --ddp_timeout 36000 \
    --logging_steps 10 "$@"
