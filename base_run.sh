#!/bin/sh
# Fine-tune on one GPU, or on the CPU where there is none.
#   sh base_run.sh                          bloom-560m on data_proj/opendata, the original's recipe, in packed sequences
#   sh base_run.sh --learning_rate 1e-5     any flag of train_sft.py; it overrides the ones below
#   sh base_run.sh --packing False          steps of 8 examples, as the original made them
#   MODEL=tiiuae/falcon-7b DATA=my_rows OUTPUT=output_dir/mine sh base_run.sh
#   sh base_run.sh --demo                   every step, on a small random model: needs no GPU, no hub, no data
#   FAMILY=falcon sh base_run.sh --demo
line_ends=LF
[ "$line_ends" = LF ] || { printf '%s\n' "error: $0 has Windows line ends; type sed -i 's/\r\$//' *.sh" >&2; exit 2; } #
set -eu
here=$(CDPATH="" cd "$(dirname "$(readlink -f "$0")")" && pwd)
. "$here/setup.sh"
set_up "$here/requirements.txt"

# With several visible GPUs one process would spread over all of them; ds_all.sh is for that.
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES%%,*}"

# Threads that wait for work soon sleep: else, on a busy machine, they keep the cores from those that they wait for.
[ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"

# On a CPU, huge pages for PyTorch's big tensors: fewer page faults.
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"

demo() {
    case ${FAMILY:-bloom} in
        bloom) family=bloom real=bigscience/bloom-560m ;;
        falcon) family=falcon real=tiiuae/falcon-7b ;;
        *) echo "error: FAMILY=$FAMILY; expected bloom or falcon" >&2 && exit 2 ;;
    esac
    output=${OUTPUT:-output_dir/demo}
    echo "== 1/4  the sample rows -> ${output}_data"
    SOURCE=sample ROWS_PER_SET="${ROWS_PER_SET:-20}" OUTPUT_FOLDER="${output}_data" "$PYTHON" -m IPython data_proj/process_data.ipynb
    echo "== 2/4  a small random $family -> ${output}_base"
    "$PYTHON" -m sft.tools.random_model --shape "$family-demo" --text "${output}_data" --output "${output}_base"
    echo "== 3/4  fine-tuning -> $output"
    "$PYTHON" "$here/train_sft.py" \
        --model_name_or_path "${output}_base" \
        --data_path "${output}_data" \
        --output_dir "$output" \
        --save_strategy no \
        --num_train_epochs 30 \
        --per_device_train_batch_size 8 \
        --learning_rate 2e-3 \
        --lr_scheduler_type cosine \
        --warmup_steps 0.05 \
        --logging_steps 60 "$@"
    echo "== 4/4  three questions from the sample"
    "$PYTHON" -m sft.chat "$output" --recall "${output}_data" --rows 3
    cat <<NEXT

Next, chat with it (it knows the sample rows and nothing else):
    $PYTHON app.py --checkpoint $output
The same on a real model and real data: run data_proj/process_data.ipynb, then
    MODEL=$real OUTPUT=output_dir/mine sh base_run.sh
NEXT
}

if [ "${1:-}" = --demo ]; then
    shift
    cd "$here"
    demo "$@"
    exit
fi

exec "$PYTHON" "$here/train_sft.py" \
    --model_name_or_path "${MODEL:-bigscience/bloom-560m}" \
    --data_path "${DATA:-$here/data_proj/opendata}" \
    --output_dir "${OUTPUT:-output_dir/bloom-560m}" \
    --num_train_epochs 3 \
    --model_max_length 2048 \
    --packing True \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 2 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --logging_steps 10 "$@"
