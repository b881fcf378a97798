#!/bin/bash
# The whole idea on made-up people: draw them, lift the pictures to clouds, learn, search, show. Run by `make demo`.
# Half of the people are trained on; the figures at the end are of the other half.
set -euo pipefail
out=${1:?usage: demo.sh FOLDER}
reid3d synth "$out/people" --preset easy --ids 48 --cams 4 --images 4 --seed 0
reid3d convert "$out/people" "$out/clouds"
reid3d train demo --data "$out/clouds" --out "$out/run"
reid3d eval "$out/run" "$out/clouds" --json "$out/eval.json"
reid3d view "$out/run" --out "$out/ranks.html"
echo "open $out/ranks.html in a browser: drag a cloud to turn it"
