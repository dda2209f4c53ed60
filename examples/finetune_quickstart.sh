#!/usr/bin/env bash
# Fine-tune the quickstart's model on conversations about images, at two resolutions: images as pre-training showed
# them (48 px), and cut into tiles (96 px: the whole and its quarters). Held-out questions are asked before and after,
# and after also about other images. Everything it makes is reused when it runs again; examples/quickstart.sh comes first.
#
# usage: examples/finetune_quickstart.sh [QUICKSTART_RUN] [FOLDER] [mm1 train options..]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pretrained=${1:-runs/quickstart}
shift $(($# > 0))
folder=${1:-runs/finetune}
shift $(($# > 0))
corpus=.cache/demo-corpus
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

in_parallel() {
  torchrun --standalone --nproc-per-node 2 -m megatron_mm1 "$@"
}

# CHECKPOINT OUTPUT [mm1 eval options..]
ask() {
  in_parallel eval --checkpoint "$1" --output "$2" --tensor-model-parallel-size 1 \
    --task demo_questions --task demo_questions_exchanged "${@:3}"
}

for split in train validation; do
  # Prepared data remembers its input, which must not be written anew.
  [[ -f $folder/$split.json ]] ||
    python examples/easy_vqa_chats.py --corpus "$corpus" --split "$split" --output "$folder/$split.json"
  mm1 data prepare --reader chat --input "$folder/$split.json" --option images="$corpus/raw/questions/$split" \
    --tokenizer "$corpus/tokenizer.model" --output "$folder/data/$split"
done

for tiling in none overview_and_crops; do
  ask "$pretrained" "$folder/$tiling/before" --image-tiling "$tiling"
  in_parallel train --config examples/finetune_quickstart.yaml --checkpoint.load "$pretrained" \
    --data.sources "[{name: instructions, path: $folder/data/train}]" \
    --data.validation "[{name: instructions, path: $folder/data/validation}]" \
    --image_tiling "$tiling" --run_dir "$folder/$tiling" --logging.progress_bar true "$@"
  ask "$folder/$tiling" "$folder/$tiling/after" --chat
  mm1 report "$folder/$tiling"
done

python benchmarks/finetuning_gain.py "$folder"/{none,overview_and_crops}
