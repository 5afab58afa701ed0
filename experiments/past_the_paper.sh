#!/bin/bash
# One cell of results/past_the_paper.md: every student with the same network, steps and data; one noise, one seed. All
# networks see single slices.
# The seed is that of the training; the noise is added once, with a seed of its own.
#
#   experiments/past_the_paper.sh CLEAN.h5 KIND:LEVEL[:CORRELATION] SEED FOLDER [FLAGS...]
#
# CLEAN.h5 is made by `data.py import`. What FOLDER already holds is not made again. FLAGS:
#   conditions   SRDS of the hidden condition, and a student of it        oracle   with the true noise model
#   variances    the posterior update with V from each of its sources     weak     a tenth of the BSN's training
set -e
clean=$1 spec=$2 seed=$3 out=$4; shift 4
IFS=: read -r kind level correlation <<< "$spec"
export PYTHONPATH; PYTHONPATH=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python} hidden= bsn_steps=1500 diffusion_steps=700 student_steps=800
mkdir -p "$out"; cd "$out"; [ "${clean:0:1}" = / ] || clean=$OLDPWD/$clean
make() { local file=$1 module=$2; shift 2; [ -e "$file" ] || "$python" -m "$module" "$@" >> log.txt 2>&1; }
student() { local name=$1; shift; make "$name.h5" distill --preset nafnet --context 0 --ensemble 1 --data noisy.h5 --seed "$seed" \
    --split test --model "$name.pt" --out "$name.h5" "$@"; }
srds() { # condition: diffusion model, its SRDS mean, a student of it
    make "$1.pt" diffusion --context 0 --data noisy.h5 --cond bsn.h5 --seed "$seed" --steps $diffusion_steps --condition "$1" \
        --model "$1.pt"
    make "srds_$1.h5" srds --cond bsn.h5 --model "$1.pt" --steps 2 --out "srds_$1.h5"
    student "student_$1" --target "srds_$1.h5" --steps $student_steps; }

make noisy.h5 noise add --data "$clean" --kind "$kind" --level "$level" --correlation "${correlation:-0}" --out noisy.h5
make first.json measure --data noisy.h5 --out first.json
spot=$("$python" -c "import json; print(json.load(open('first.json'))['blind_spot'])")
case " $* " in *" conditions "*) hidden=--hidden ;; esac
make bsn.h5 bsn --context 0 --data noisy.h5 --blind-spot "$spot" --steps $bsn_steps --seed "$seed" $hidden --model bsn.pt --out bsn.h5
make noise.json measure --data noisy.h5 --pred bsn.h5 --out noise.json
make nlm.h5 experiments.baselines --data noisy.h5 --noise noise.json --split test --out nlm.h5
make posterior.h5 posterior --data noisy.h5 --pred bsn.h5 --noise noise.json --out posterior.h5
student supervised --target clean --steps $student_steps
student student_posterior --target posterior.h5 --steps $student_steps
student student_recorrupted --target recorrupted --noise noise.json --pred posterior.h5 --steps $student_steps
srds plain
make posterior_srds.h5 posterior --data noisy.h5 --pred srds_plain.h5 --noise noise.json --out posterior_srds.h5
rows="nlm bsn posterior srds_plain posterior_srds supervised student_plain student_posterior student_recorrupted"
for flag in "$@"; do
    if [ "$flag" = conditions ]; then
        srds hidden
        make posterior_hidden.h5 posterior --data noisy.h5 --pred srds_hidden.h5 --noise noise.json --out posterior_hidden.h5
        rows="$rows srds_hidden student_hidden posterior_hidden"
    elif [ "$flag" = variances ]; then
        make nll.h5 bsn --context 0 --data noisy.h5 --blind-spot "$spot" --steps $bsn_steps --seed "$seed" --loss nll --model nll.pt --out nll.h5
        make spread.h5 srds --cond bsn.h5 --model plain.pt --steps 2 --pairs 8 --split test --out spread.h5
        for v in energy spectrum; do
            make "v_$v.h5" posterior --data noisy.h5 --pred bsn.h5 --noise noise.json --variance $v --out "v_$v.h5"; done
        make v_predicted.h5 posterior --data noisy.h5 --pred nll.h5 --noise noise.json --variance predicted --out v_predicted.h5
        make v_nll_energy.h5 posterior --data noisy.h5 --pred nll.h5 --noise noise.json --variance energy --out v_nll_energy.h5
        make v_spread.h5 posterior --data noisy.h5 --pred spread.h5 --noise noise.json --variance spread --out v_spread.h5
        rows="$rows nll spread v_energy v_spectrum v_predicted v_nll_energy v_spread"
    elif [ "$flag" = weak ]; then
        make weak.h5 bsn --context 0 --data noisy.h5 --blind-spot "$spot" --steps $((bsn_steps / 10)) --seed "$seed" --model weak.pt --out weak.h5
        make weak_diffusion.pt diffusion --context 0 --data noisy.h5 --cond weak.h5 --seed "$seed" --steps $diffusion_steps \
            --model weak_diffusion.pt
        make weak_srds.h5 srds --cond weak.h5 --model weak_diffusion.pt --steps 2 --split test --out weak_srds.h5
        make weak_posterior.h5 posterior --data noisy.h5 --pred weak.h5 --noise noise.json --out weak_posterior.h5
        make weak_posterior_srds.h5 posterior --data noisy.h5 --pred weak_srds.h5 --noise noise.json --out weak_posterior_srds.h5
        rows="$rows weak weak_srds weak_posterior weak_posterior_srds"
    elif [ "$flag" = oracle ]; then
        student oracle_noise --target recorrupted --noise "$spec" --pred posterior.h5 --steps $student_steps
        make posterior_oracle.h5 posterior --data noisy.h5 --pred bsn.h5 --noise "$spec" --out posterior_oracle.h5
        rows="$rows oracle_noise posterior_oracle"
    fi
done
"$python" -m evaluate --data noisy.h5 --pred $(printf '%s.h5 ' $rows) --json cell.json > cell.md
grep '^|' cell.md
