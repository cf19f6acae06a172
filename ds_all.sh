#!/bin/sh
# Fine-tune on every GPU of this host, or of the hosts in HOSTFILE, with DeepSpeed ZeRO-2 or ZeRO-3.
#   sh ds_all.sh                                     bloom-560m on data_proj/opendata, ZeRO-2
#   MODEL=bigscience/bloom-7b1 OUTPUT=output_dir/bloom-7b1 ZERO_STAGE=3 sh ds_all.sh
#   MODEL=tiiuae/falcon-7b DATA=my_rows OUTPUT=output_dir/mine sh ds_all.sh --num_train_epochs 1
#   HOSTFILE=hosts sh ds_all.sh                      lines "host slots=8"; reached by ssh, same paths on each
#   DEVICE=cpu NUM_GPUS=2 sh ds_all.sh               two ranks on the CPU, to try things out
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/setup.sh"
set_up "$here/requirements.txt"

# An unused port, so that two runs on one host do not meet.
MASTER_PORT=${MASTER_PORT:-$("$PYTHON" -c '
import socket
with socket.socket() as free:
    free.bind(("", 0))
    print(free.getsockname()[1])')}

# On a CPU, huge pages for PyTorch's big tensors: fewer page faults.
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"

if [ "${DEVICE:-gpu}" = cpu ]; then
    export DS_ACCELERATOR=cpu
    set -- --use_cpu True "$@"
    launch="--num_accelerators ${NUM_GPUS:-2}"
elif [ -n "${HOSTFILE:-}" ]; then
    launch="--hostfile $HOSTFILE${NUM_GPUS:+ --num_gpus $NUM_GPUS}"
else
    launch="${NUM_GPUS:+--num_gpus $NUM_GPUS}"
fi

# $launch is several words.
# shellcheck disable=SC2086
exec "$PYTHON" -m deepspeed.launcher.runner --master_port "$MASTER_PORT" $launch "$here/train_sft.py" \
    --model_name_or_path "${MODEL:-bigscience/bloom-560m}" \
    --data_path "${DATA:-$here/data_proj/opendata}" \
    --output_dir "${OUTPUT:-output_dir/bloom-560m-zero${ZERO_STAGE:-2}}" \
    --deepspeed "$here/ds_zero${ZERO_STAGE:-2}_config.json" \
    --num_train_epochs 3 \
    --model_max_length 2048 \
    --packing True \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --activation_checkpointing True \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 2 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --ddp_timeout 36000 \
    --logging_steps 10 "$@"
