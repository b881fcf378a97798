// Streets with a person (csrc/cpu/paint.h), in arrays not a number longer than they may be: that a picture agrees with
// itself, and that the sanitizers have nothing to say.
#define REID3D_ISA native
// GCC 12 finds uninitialized variables in its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "../../csrc/cpu/paint.h"
#include "warp_clouds.h"

#include <cstring>
#include <utility>

using namespace reid3d;

namespace {

constexpr int64_t kImages = 2, kBare = 9, kJoints = 2, kParts = 7, kMaterials = 10, kTextures = 9;
// Between the corners of a box: bit k of a corner tells its side along axis k.
constexpr int kBox[12][3] = {{0, 1, 3}, {0, 3, 2}, {4, 6, 7}, {4, 7, 5}, {0, 4, 5}, {0, 5, 1},
                             {2, 3, 7}, {2, 7, 6}, {0, 2, 6}, {0, 6, 4}, {1, 5, 7}, {1, 7, 3}};

float uniform(Random& random, float low, float high) {
  return low + (high - low) * static_cast<float>(pick(random, 1 << 20)) / 1048576;
}
float either(Random& random, float a, float b) { return pick(random, 2) ? a : b; }

// The numbers of rows of a table.
template <typename T>
std::pair<float*, int64_t> numbers(std::vector<T>& rows) {
  return {reinterpret_cast<float*>(rows.data()), static_cast<int64_t>(rows.size() * sizeof(T) / sizeof(float))};
}

// A body that is a box and a vertex of no face, moved by two joints; a box that it wears, or nothing; and what stands
// about them, or nothing.
struct Street {
  int64_t V, F, quads, framed;
  std::vector<float> rest, transforms, weight, worn, fields, taps, tone;
  std::vector<int64_t> joint, faces, part, part_material;
  std::vector<int32_t> corners;
  std::vector<Outfit> outfit;
  std::vector<Material> material;
  std::vector<Quad> quad;
  std::vector<View> view;

  Street(int round, int64_t height, Random& random)
      : V(kBare + (round % 4 ? 8 : 0)),
        F(round % 4 ? 24 - pick(random, 6) : 12),
        quads(round % 5 ? kTextures : 0),
        framed(3 + pick(random, static_cast<int>(V) - 2)),
        rest(kImages * kBare * 3),
        transforms(kImages * kJoints * 12),
        weight(kBare * 4),
        worn(kImages * (V - kBare) * 3),
        fields(V * kFields),
        taps(kImages * 10),
        tone(kImages * 257),
        joint(kBare * 4),
        faces(F * 3),
        part(F),
        part_material(kImages * kParts),
        corners(3 * round_up(F, kLeaf)),
        outfit(kImages),
        material(kImages * kMaterials),
        quad(kImages * quads),
        view(kImages) {
    const float axes[3] = {0.6f, 1.3f, 0.4f}, low[3] = {-0.3f, -1, -0.2f};
    const auto corner = [&](int64_t v, int k) { return low[k] + axes[k] * static_cast<float>(v >> k & 1); };
    for (int64_t i = 0; i < kImages * kBare * 3; ++i)
      rest[i] = corner(i / 3 % kBare, static_cast<int>(i % 3)) + uniform(random, -0.05f, 0.05f);
    for (int64_t i = 0; i < kImages * (V - kBare) * 3; ++i)
      worn[i] = 0.4f * corner(i / 3 % 8, static_cast<int>(i % 3)) + (i % 3 ? 0 : 0.4f) + uniform(random, -0.05f, 0.05f);
    for (float& share : weight) share = 0.25f;
    for (int64_t& which : joint) which = pick(random, kJoints);
    for (int64_t v = 0; v < V; ++v) {
      const float on_foot = pick(random, 4) ? 0.0f : 1;
      const float x = uniform(random, -0.3f, 0.3f), y = uniform(random, -1, 0.3f), z = uniform(random, -0.2f, 0.2f);
      const float place[kFields] = {x, y, z, uniform(random, 0, 1), uniform(random, 0, 1.2f), either(random, 0, 1),
                                    either(random, 0, 1), on_foot};
      std::copy_n(place, kFields, &fields[v * kFields]);
    }
    for (int64_t f = 0; f < F; ++f) {
      part[f] = f < 12 ? -1 : f % kParts;
      for (int k = 0; k < 3; ++k) faces[3 * f + k] = (f < 12 ? 0 : kBare) + kBox[f % 12][k];
      for (int k = 0; k < 3; ++k) corners[k * round_up(F, kLeaf) + f] = static_cast<int32_t>(3 * faces[3 * f + k]);
    }
    for (int64_t& which : part_material) which = pick(random, kMaterials);
    for (size_t i = 0; i < tone.size(); ++i) tone[i] = std::min(1.0f, static_cast<float>(i % 257) / 255);
    for (int64_t i = 0; i < 2 * kImages; ++i) {
      const float sharp[5] = {1, 0, 0, 0, 0}, soft[5] = {0.4f, 0.15f, 0.1f, 0.04f, 0.01f};
      std::copy_n(pick(random, 2) ? sharp : soft, 5, &taps[5 * i]);
    }
    for (int64_t b = 0; b < kImages; ++b) furnish(round, height, b, random);
  }

  void furnish(int round, int64_t height, int64_t b, Random& random) {
    const auto grey = [&] { return uniform(random, 0, 1); };
    for (int64_t k = 0; k < kMaterials; ++k)
      material[b * kMaterials + k] = {{grey(), grey(), grey()},
                                      {grey(), grey(), grey()},
                                      static_cast<float>((k + round) % 10),
                                      either(random, 8, 0.1f),
                                      grey(),
                                      grey()};
    outfit[b] = {grey(),
                 grey(),
                 grey(),
                 either(random, 0, 0.4f),
                 either(random, 0.1f, 2),
                 either(random, 0, 0.2f),
                 either(random, 0, 0.2f),
                 1,
                 static_cast<float>(pick(random, 4)),
                 static_cast<float>(pick(random, 100))};

    const float pan = uniform(random, -3, 3), pitch = uniform(random, -0.2f, 0.6f), tall = static_cast<float>(height);
    const float ahead[2] = {std::sin(pan), std::cos(pan)}, right[2] = {ahead[1], -ahead[0]};
    const float flat = std::cos(pitch), steep = std::sin(pitch);
    View& w = view[b];
    w = {};
    const float rotation[9] = {right[0], -steep * ahead[0], flat * ahead[0], 0, -flat, -steep, right[1],
                               -steep * ahead[1], flat * ahead[1]};
    const float sun[3] = {0.6f * right[0], 0.8f, 0.6f * right[1]};
    std::copy_n(rotation, 9, w.rotation);
    for (int k = 0; k < 3; ++k) {
      w.up[k] = rotation[3 + k];
      w.light[k] = rotation[k] * sun[0] + rotation[3 + k] * sun[1] + rotation[6 + k] * sun[2];
      w.gain[k] = uniform(random, 0.5f, 2);
      for (float* colour : {w.sky, w.haze, w.ground_colour, w.ground_second}) colour[k] = grey();
    }
    w.distance = uniform(random, 2, 10);
    w.tall = (tall + 30) * uniform(random, 0.4f, 1.2f);
    w.column = uniform(random, 0, 64);
    w.row = tall * uniform(random, 0.2f, 0.8f);
    w.x = uniform(random, -50, 50);
    w.z = uniform(random, -50, 50);
    w.ambient = grey();
    w.sun = grey();
    w.shadow = either(random, 0, 0.5f);
    w.noise = either(random, 0, 0.02f);
    w.seed = static_cast<float>(pick(random, 1 << 24));
    w.ground = static_cast<float>(pick(random, 3));
    w.ground_scale = 1.5f;
    w.ground_seed = static_cast<float>(pick(random, 1 << 24));

    const float fall = uniform(random, -0.3f, 1);  // of the root below the camera's axis
    for (int64_t j = 0; j < kJoints; ++j) {
      const float turn = uniform(random, -3, 3), c = std::cos(turn), s = std::sin(turn);
      const float matrix[12] = {c, 0, s, 0, 0, -1, 0, fall, s, 0, -c, 0};
      std::copy_n(matrix, 12, &transforms[(b * kJoints + j) * 12]);
    }

    for (int64_t i = 0; i < quads; ++i) {
      // How far ahead of the camera its foot is and how far to the right; where to it leads, and how far.
      const float d = w.distance, spread = uniform(random, -1, 1), turn = uniform(random, -1.2f, 1.2f);
      const float places[5][4] = {{1.5f * d, 2 * spread - 3, turn, 5},  // behind the person
                                  {0.5f * d, spread - 0.5f, turn, 1},   // before them
                                  {-d, spread - 1, turn, 2},            // behind the camera
                                  {-3, spread, 1.5708f, 20},            // beside it, from behind to before
                                  {0.4f * d, 0, 1.5708f, 20}};          // edge-on
      const int place = pick(random, 5);
      const auto [forth, aside, to, width] = places[place];
      const float c = std::cos(to), s = std::sin(to);
      const bool before = round % 3 && (place == 1 || pick(random, 6) == 0);
      const float bottom = either(random, 0, uniform(random, -1, 1));
      quad[b * quads + i] = {w.x + forth * ahead[0] + aside * right[0],
                             w.z + forth * ahead[1] + aside * right[1],
                             c * right[0] + s * ahead[0],
                             c * right[1] + s * ahead[1],
                             pick(random, 10) ? width : 0,
                             bottom,
                             bottom + uniform(random, 0.5f, 3),
                             static_cast<float>(i),
                             uniform(random, 0.1f, 0.8f),
                             static_cast<float>(pick(random, 1 << 24)),
                             before ? 1.0f : 0,
                             {grey(), grey(), grey()},
                             {grey(), grey(), grey()}};
    }
  }

  Scene scene() const {
    return {kBare, V, kJoints, F, kParts, kMaterials, quads,  // their numbers
            rest.data(), transforms.data(), joint.data(), weight.data(), worn.data(), framed, faces.data(),
            corners.data(), part.data(), fields.data(), outfit.data(), part_material.data(), material.data(),
            quad.data(), view.data(), taps.data(), tone.data()};
  }

  std::vector<std::pair<float*, int64_t>> tables() {
    return {numbers(rest), numbers(transforms), numbers(weight), numbers(worn), numbers(fields), numbers(taps),
            numbers(tone), numbers(outfit), numbers(quad), numbers(view)};
  }
};

// What paint writes over bytes that are all `rubbish`: 255 is in scratch a float that is no number, and no bool.
struct Painting {
  std::vector<uint8_t> image, mask, seen, shown;
  std::vector<float> depth;
  std::vector<Frame> frame;

  Painting(const Street& street, int64_t b, int64_t height, uint8_t rubbish)
      : image(height * 64 * 3, rubbish),
        mask(height * 64, rubbish),
        seen(height * 64, rubbish),
        shown(street.V, rubbish),
        depth(height * 64),
        frame(1) {
    std::vector<float> floats(paint_scratch(street.V, height));
    std::vector<int64_t> faces(height * 64);
    std::memset(floats.data(), rubbish, floats.size() * sizeof(float));
    std::memset(faces.data(), rubbish, faces.size() * sizeof(int64_t));
    std::memset(depth.data(), rubbish, depth.size() * sizeof(float));
    const auto bools = [](std::vector<uint8_t>& bytes) { return reinterpret_cast<bool*>(bytes.data()); };
    native::paint(street.scene(), b, height, floats.data(), faces.data(),
                  {image.data(), bools(mask), bools(seen), bools(shown), depth.data(), frame.data()});
  }

  bool same_person(const Painting& o) const {
    return mask == o.mask && seen == o.seen && shown == o.shown && depth == o.depth &&
           !std::memcmp(frame.data(), o.frame.data(), sizeof(Frame));
  }
};

// Adds how many pixels are the person's, and how many of them something hides.
void check_picture(const Street& street, int64_t b, int64_t height, int round, int64_t& covered, int64_t& hidden) {
  const Painting one(street, b, height, 255), again(street, b, height, 1);
  CHECK(one.same_person(again) && one.image == again.image, "again", round, b, height);
  const Quad* quads = street.quad.data() + b * street.quads;
  const bool before = std::any_of(quads, quads + street.quads, [](const Quad& q) { return q.before > 0.5f; });
  for (int64_t i = 0; i < height * 64; ++i) {
    CHECK(one.mask[i] <= 1 && one.seen[i] <= one.mask[i], "seen", round, b, height, i);
    CHECK(before || one.seen[i] == one.mask[i], "nothing hides", round, b, height, i);
    CHECK(one.mask[i] ? std::abs(one.depth[i]) < 2 : one.depth[i] == 0, "depth", round, b, height, i, one.depth[i]);
    covered += one.mask[i];
    hidden += one.mask[i] - one.seen[i];
  }
  for (int64_t v = 0; v < street.V; ++v) {
    const int64_t uses = std::count(street.faces.begin(), street.faces.end(), v);
    CHECK(one.shown[v] <= (uses ? 1 : 0), "shown", round, b, height, v);
  }
  CHECK(*std::max_element(one.shown.begin(), one.shown.end()) == *std::max_element(one.seen.begin(), one.seen.end()),
        "some shown", round, b, height);

  // What is no number is turned into a whole one here and there: of no consequence, but clang's sanitizer objects.
#ifndef __clang__
  const auto spoil = [](std::pair<float*, int64_t> table) { std::fill_n(table.first, table.second, std::nanf("")); };
  Street spoilt = street;
  spoil(numbers(spoilt.material));
  CHECK(one.same_person(Painting(spoilt, b, height, 255)), "materials", round, b, height);
  if (height != 37 || round % 4 != 1) return;
  for (size_t k = 0; k < spoilt.tables().size(); ++k) {
    spoilt = street;
    spoil(spoilt.tables()[k]);
    const Painting bad(spoilt, b, height, 255);
    for (int64_t i = 0; i < height * 64; ++i) CHECK(bad.seen[i] <= bad.mask[i], "spoilt", round, b, k, i);
  }
#endif
}

}  // namespace

int main() {
  Random random(0);
  for (const int64_t height : {1, 37, 128}) {
    int64_t covered = 0, hidden = 0;  // lest nothing be checked
    for (int round = 0; round < 20; ++round) {
      const Street street(round, height, random);
      for (int64_t b = 0; b < kImages; ++b) check_picture(street, b, height, round, covered, hidden);
    }
    CHECK(10 * covered > kImages * 20 * height * 64 && 20 * hidden > covered, height, covered, hidden);
  }
  return 0;
}
