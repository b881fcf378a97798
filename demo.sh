#!/bin/bash
# The whole idea on made-up people: draw them, lift the pictures to clouds, learn, search, show. Run by `make demo`.
set -euo pipefail
out=${1:?usage: demo.sh FOLDER}
reid3d synth "$out/images" --ids 60 --cams 4 --images 4 --seed 0
reid3d convert "$out/images" "$out/clouds"
reid3d train demo --data "$out/clouds" --out "$out/run"
reid3d eval "$out/run" "$out/clouds"
reid3d view "$out/run/features" --out "$out/ranks.html"
