// Streets with a person, a crop at a time. Contract and meaning of every number: preprocess/synth/paint.py. Nothing
// here but sums, products, quotients, roots, floors and comparisons, each rounded as it is written, so that every
// machine paints the same bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "rasterize.h"

namespace reid3d::REID3D_ISA {

// pcg_output of Jarzynski and Olano, "Hash Functions for GPU Rendering", 2020.
inline uint32_t scramble(uint32_t v) {
  const uint32_t state = v * 747796405u + 2891336453u;
  const uint32_t word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
  return (word >> 22u) ^ word;
}
inline float unit(uint32_t hash) { return static_cast<float>(static_cast<int32_t>(hash >> 8)) * 0x1p-24f; }
inline float cell(float x, float y, uint32_t seed) {
  return unit(scramble(static_cast<uint32_t>(static_cast<int32_t>(x)) +
                       scramble(static_cast<uint32_t>(static_cast<int32_t>(y)) + seed)));
}
inline float fraction(float x) { return x - std::floor(x); }
inline float magnitude(float x) { return x < 0 ? -x : x; }
// Not a number is low.
inline float between(float x, float low, float high) { return x > low ? (x < high ? x : high) : low; }
inline float mixed(float a, float b, float t) { return a + (b - a) * t; }

// Value noise in [0,1): random at whole x and y, smooth between.
inline float noise(float x, float y, uint32_t seed) {
  const float i = std::floor(x), j = std::floor(y), u = x - i, v = y - j;
  const float s = u * u * (3 - 2 * u), t = v * v * (3 - 2 * v);
  const float above = mixed(cell(i, j, seed), cell(i + 1, j, seed), s);
  return mixed(above, mixed(cell(i, j + 1, seed), cell(i + 1, j + 1, seed), s), t);
}

// A row of numbers that the loops below fill a pixel at a time.
constexpr int64_t kRow = 64;
using Row = float[kRow];

enum Texture { kPlain, kBricks, kWindows, kSlats, kBlocks, kFoliage, kFigure, kCar, kFence };

// What of a surface of kind `kind` is at (s, h) metres: how much of the second colour, how bright, how opaque.
template <int kind>
inline void texel(const Quad& q, float s, float h, uint32_t seed, float& second, float& light, float& opaque) {
  const float tall = q.top - q.bottom, v = h / tall, u = s / tall;
  second = 0;
  light = 1;
  opaque = 1;
  if (kind == kPlain) {
    light = 0.9f + 0.2f * noise(s * 9, h * 9, seed);
  } else if (kind == kBricks) {
    const float row = std::floor(h / q.size * 2), shift = fraction(row * 0.5f);
    const float across = fraction(s / q.size + shift), up = fraction(h / q.size * 2);
    second = (across < 0.07f) | (up < 0.14f) ? 1.0f : 0.0f;
    light = 0.85f + 0.3f * cell(std::floor(s / q.size + shift), row, seed);
  } else if (kind == kWindows) {
    const float across = fraction(s / q.size), up = fraction(h / (q.size * 1.25f));
    second = (across > 0.28f) & (across < 0.78f) & (up > 0.3f) & (up < 0.85f) ? 1.0f : 0.0f;
    const float pane = cell(std::floor(s / q.size), std::floor(h / (q.size * 1.25f)), seed);
    light = second > 0 ? 0.5f + pane : 0.92f + 0.16f * noise(s * 5, h * 5, seed);
  } else if (kind == kSlats) {
    second = fraction(h / q.size * 4) < 0.25f ? 1.0f : 0.0f;
  } else if (kind == kBlocks) {
    const float i = std::floor(s / q.size), j = std::floor(h / q.size * 0.7f);
    second = cell(i, j, seed);
    light = 0.55f + 0.9f * cell(i, j, seed + 1);
  } else if (kind == kFoliage) {
    const float x = (s - 0.5f * q.width) / (0.5f * q.width), y = 2 * v - 1;
    const float leaves = noise(s * 7, h * 7, seed), boughs = noise(s * 2, h * 2, seed + 1);
    second = leaves;
    light = (0.45f + 0.8f * boughs) * (0.8f + 0.35f * v);
    opaque = x * x + y * y < 0.45f + 0.55f * boughs + 0.3f * leaves - 0.15f ? 1.0f : 0.0f;
  } else if (kind == kFigure) {  // 2 as `second` is skin, 3 dark
    const float x = u - 0.5f * q.width / tall, side = magnitude(x), gap = q.size * (0.5f - v);
    const float head = x * x * 494 + (v - 0.93f) * (v - 0.93f) * 204;
    const float shoulder = v > 0.8f ? (v - 0.8f) * 0.9f : 0.0f;
    const float wide = 0.07f + 0.1f * (v > 0.6f ? v - 0.6f : 0.0f) + 0.15f * (v < 0.56f ? 0.56f - v : 0.0f);
    const float leg = magnitude(side - gap * 0.5f - 0.032f) - 0.012f - 0.05f * v;
    const bool torso = (side < wide - shoulder) & (v > 0.47f) & (v < 0.87f);
    const bool arm = (side >= wide) & (side < wide + 0.036f - shoulder) & (v > 0.44f) & (v < 0.83f);
    const bool legs = (leg < 0) & (v <= 0.48f);
    const float clothes = torso | arm ? 0.0f : v < 0.035f ? 3.0f : 1.0f;
    second = head < 1 ? (v > 0.945f ? 3.0f : 2.0f) : arm & (v < 0.485f) ? 2.0f : clothes;
    const float round = arm ? 0.85f : 1.1f - 30 * side * side;
    light = (0.8f + 0.3f * noise(s * 8, h * 5, seed)) * round * (x < 0 ? 0.92f : 1.05f);
    opaque = (head < 1) | torso | arm | legs ? 1.0f : 0.0f;
  } else if (kind == kCar) {
    const float x = s / q.width, wheel = (h - 0.31f) * (h - 0.31f);
    const float front = s - 0.19f * q.width, rear = s - 0.81f * q.width;
    const float nearer = (front * front < rear * rear ? front * front : rear * rear) + wheel;
    const bool body = (v > 0.16f) & (v < 0.64f) & (x > 0.02f * v) & (x < 1 - 0.02f * v);
    const bool cabin = (v >= 0.6f) & (x > 0.16f + (v - 0.6f) * 0.4f) & (x < 0.86f - (v - 0.6f) * 0.25f);
    const bool glass = cabin & (v < 0.95f) & (v > 0.65f) & (magnitude(x - 0.5f) > 0.012f);
    second = nearer < 0.105f ? 3.0f : glass ? 1.0f : 0.0f;
    light = nearer < 0.03f ? 4.0f : 0.75f + 0.45f * v;
    opaque = body | cabin | (nearer < 0.105f) ? 1.0f : 0.0f;
  } else {
    opaque = (fraction(s / q.size) < 0.16f) | (v > 0.93f) | ((v > 0.1f) & (v < 0.16f)) ? 1.0f : 0.0f;
  }
}

constexpr int64_t kTaps = 5;  // of half a blur kernel

// Paints what is not the person on a crop of height x kRow pixels: a plane for each of red, green and blue.

class Painter {
  const View& view_;
  const Frame& frame_;
  const int64_t height_;
  float* const planes_[3];

  // The ray of the pixel's centre in the world: metres right, up and forward for each metre away.
  void rays(int64_t row, Row x, Row y, Row z) const {
    const float* r = view_.rotation;
    const float down = (static_cast<float>(row) + 0.5f - frame_.y0) / frame_.zoom;
    for (int64_t i = 0; i < kRow; ++i) {
      const float right = (static_cast<float>(static_cast<int32_t>(i)) + 0.5f - frame_.x0) / frame_.zoom;
      x[i] = r[0] * right + r[1] * down + r[2];
      y[i] = r[3] * right + r[4] * down + r[5];
      z[i] = r[6] * right + r[7] * down + r[8];
    }
  }

  // The pixels between the projections of a quad's corners; all of them where one lies beside the camera or behind it.
  struct Window {
    int64_t top, bottom, left, right;  // half open; columns are multiples of 8
  };
  Window window(const Quad& q) const {
    const float* r = view_.rotation;
    const float tall = static_cast<float>(static_cast<int32_t>(height_)), wide = static_cast<float>(kRow);
    float top = tall, bottom = 0, left = wide, right = 0;
    for (int k = 0; k < 4; ++k) {
      const float along = k & 1 ? q.width : 0.0f;
      const float x = q.x + along * q.dx - view_.x, y = (k & 2 ? q.top : q.bottom) - frame_.height;
      const float z = q.z + along * q.dz - view_.z;
      const float away = r[2] * x + r[5] * y + r[8] * z;
      if (!(away > 0.3f)) return {0, height_, 0, kRow};
      const float row = (r[1] * x + r[4] * y + r[7] * z) / away * frame_.zoom + frame_.y0;
      const float column = (r[0] * x + r[3] * y + r[6] * z) / away * frame_.zoom + frame_.x0;
      top = std::min(top, row);
      bottom = std::max(bottom, row);
      left = std::min(left, column);
      right = std::max(right, column);
    }
    return {static_cast<int64_t>(between(top - 1, 0, tall)), static_cast<int64_t>(between(bottom + 2, 0, tall)),
            static_cast<int64_t>(between(left - 1, 0, wide)) / 8 * 8,
            (static_cast<int64_t>(between(right + 1, 0, wide)) + 7) / 8 * 8};
  }

  template <int kind>
  void quad(const Quad& q, bool* seen) const {
    const uint32_t seed = static_cast<uint32_t>(static_cast<int32_t>(q.seed));
    const float skin[3] = {0.62f, 0.46f, 0.38f}, dark[3] = {0.06f, 0.055f, 0.05f};
    const float nx = -q.dz, nz = q.dx, away = (q.x - view_.x) * nx + (q.z - view_.z) * nz;
    const float dx = q.dx, dz = q.dz, width = q.width, tall = q.top - q.bottom, rise = frame_.height - q.bottom;
    const float from = (view_.x - q.x) * dx + (view_.z - q.z) * dz;
    const Window in = window(q);
    const int64_t left = in.left, count = in.right - in.left;
    for (int64_t row = in.top; row < in.bottom; ++row) {
      Row x, y, z, second, light, opaque;
      int32_t inside[kRow], any = 0;
      rays(row, x, y, z);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t i = left + k;
        const float t = away / (x[i] * nx + z[i] * nz);
        const float s = from + t * (x[i] * dx + z[i] * dz), h = rise + t * y[i];
        inside[k] = (t > 0.3f) & (s >= 0) & (s < width) & (h >= 0) & (h < tall);
        x[i] = inside[k] ? s : 0.0f;
        y[i] = inside[k] ? h : 0.0f;
      }
      for (int64_t k = 0; k < count; ++k) any |= inside[k];
      if (!any) continue;
      for (int64_t k = 0; k < count; ++k)
        texel<kind>(q, x[left + k], y[left + k], seed, second[k], light[k], opaque[k]);
      for (int64_t k = 0; k < count; ++k) opaque[k] = inside[k] ? opaque[k] : 0.0f;
      for (int c = 0; c < 3; ++c) {
        float* out = planes_[c] + row * kRow + left;
        const float one = q.colour[c], other = q.second[c];
        for (int64_t k = 0; k < count; ++k) {
          float colour = mixed(one, other, second[k] > 1 ? 1.0f : second[k]);
          if (kind == kFigure || kind == kCar)
            colour = second[k] > 2.5f ? dark[c] : second[k] > 1.5f ? skin[c] : colour;
          out[k] = opaque[k] > 0.5f ? colour * light[k] : out[k];
        }
      }
      if (seen)
        for (int64_t k = 0; k < count; ++k) seen[row * kRow + left + k] &= opaque[k] <= 0.5f;
    }
  }

  void ground_row(int64_t row) const {
    const View& v = view_;
    const uint32_t seed = static_cast<uint32_t>(static_cast<int32_t>(v.ground_seed));
    Row x, y, z, share, light;
    rays(row, x, y, z);
    for (int64_t i = 0; i < kRow; ++i) {
      const float t = frame_.height / (y[i] < -0.01f ? -y[i] : 0.01f);
      x[i] = (v.x + t * x[i]) * v.ground_scale;
      z[i] = (v.z + t * z[i]) * v.ground_scale;
    }
    for (int64_t i = 0; i < kRow; ++i) {
      const float coarse = noise(x[i] * 0.7f, z[i] * 0.7f, seed), fine = noise(x[i] * 7, z[i] * 7, seed + 1);
      light[i] = 0.75f + 0.3f * coarse + 0.2f * fine;
      share[i] = v.ground < 1.5f ? 0.0f : fine;
    }
    if (v.ground > 0.5f && v.ground < 1.5f) {  // tiles
      for (int64_t i = 0; i < kRow; ++i) {
        const float tile = cell(std::floor(x[i]), std::floor(z[i]), seed + 2);
        share[i] = (fraction(x[i]) < 0.06f) | (fraction(z[i]) < 0.06f) ? 1.0f : 0.2f * tile;
      }
    } else if (v.ground < 0.5f) {  // asphalt with a line
      for (int64_t i = 0; i < kRow; ++i)
        share[i] = magnitude(fraction(z[i] * 0.11f + 0.37f) - 0.5f) < 0.012f ? 1.0f : 0.0f;
    }
    for (int c = 0; c < 3; ++c) {
      float* out = planes_[c] + row * kRow;
      for (int64_t i = 0; i < kRow; ++i) {
        const float far = between(-y[i] * 12, 0, 1), sky = between(0.5f + y[i] * 2, 0, 1);
        const float floor = mixed(v.ground_colour[c], v.ground_second[c], share[i]) * light[i];
        const float above = mixed(v.haze[c], v.sky[c], sky);
        out[i] = y[i] < 0 ? mixed(v.haze[c], floor, far) : above;
      }
    }
  }

 public:
  Painter(const View& view, const Frame& frame, int64_t height, float* planes)
      : view_(view),
        frame_(frame),
        height_(height),
        planes_{planes, planes + height * kRow, planes + 2 * height * kRow} {}

  void ground(const int64_t* shadow) const {
    for (int64_t row = 0; row < height_; ++row) ground_row(row);
    if (!(view_.shadow > 0)) return;
    const float left = 1 - view_.shadow;
    for (float* plane : planes_)
      for (int64_t i = 0; i < height_ * kRow; ++i) plane[i] *= shadow[i] < 0 ? 1.0f : left;
  }

  // Every quad in turn that stands before the person, or behind; those before clear `seen`.
  void quads(const Quad* quads, int64_t count, bool before, bool* seen) const {
    for (const Quad* q = quads; q < quads + count; ++q) {
      if ((q->before > 0.5f) != before || !(q->width > 0)) continue;
      switch (static_cast<int>(q->kind)) {
        case kPlain: quad<kPlain>(*q, seen); break;
        case kBricks: quad<kBricks>(*q, seen); break;
        case kWindows: quad<kWindows>(*q, seen); break;
        case kSlats: quad<kSlats>(*q, seen); break;
        case kBlocks: quad<kBlocks>(*q, seen); break;
        case kFoliage: quad<kFoliage>(*q, seen); break;
        case kFigure: quad<kFigure>(*q, seen); break;
        case kCar: quad<kCar>(*q, seen); break;
        default: quad<kFence>(*q, seen);
      }
    }
  }

  // Convolve with the taps {middle, one off, two off, ..} along both axes; the border repeats. `copy` is scratch.
  void blur(const float* taps, float* copy) const {
    if (!(taps[0] < 1)) return;
    for (float* plane : planes_) {
      float* across = copy;
      for (int64_t row = 0; row < height_; ++row) {
        float line[kRow + 2 * (kTaps - 1)];
        const float* in = plane + row * kRow;
        for (int64_t k = 0; k < kTaps - 1; ++k) {
          line[k] = in[0];
          line[kTaps - 1 + kRow + k] = in[kRow - 1];
        }
        std::copy_n(in, kRow, line + kTaps - 1);
        float* out = across + row * kRow;
        for (int64_t i = 0; i < kRow; ++i) {
          const float* at = line + kTaps - 1 + i;
          float sum = taps[0] * at[0];
          for (int64_t k = 1; k < kTaps; ++k) sum += taps[k] * (at[-k] + at[k]);
          out[i] = sum;
        }
      }
      for (int64_t row = 0; row < height_; ++row) {
        float* out = plane + row * kRow;
        const float* in[2 * kTaps - 1];
        for (int64_t k = 1 - kTaps; k < kTaps; ++k)
          in[k + kTaps - 1] = across + std::clamp<int64_t>(row + k, 0, height_ - 1) * kRow;
        for (int64_t i = 0; i < kRow; ++i) {
          float sum = taps[0] * in[kTaps - 1][i];
          for (int64_t k = 1; k < kTaps; ++k) sum += taps[k] * (in[kTaps - 1 - k][i] + in[kTaps - 1 + k][i]);
          out[i] = sum;
        }
      }
    }
  }

  // Exposure, tone curve, noise, eight bits.
  void develop(const float* tone, uint8_t* image) const {
    const uint32_t seed = static_cast<uint32_t>(static_cast<int32_t>(view_.seed));
    const auto grain = [](uint32_t hash) {  // four bytes added: nearly Gaussian, of variance 1
      const uint32_t sum = (hash & 255) + (hash >> 8 & 255) + (hash >> 16 & 255) + (hash >> 24);
      return (static_cast<float>(static_cast<int32_t>(sum)) - 510) * 0.006766f;
    };
    for (int64_t row = 0; row < height_; ++row) {
      Row luma;
      for (int64_t i = 0; i < kRow; ++i)
        luma[i] = grain(scramble(static_cast<uint32_t>(row * kRow + i) * 4 + seed));
      for (int64_t c = 0; c < 3; ++c) {
        const float* in = planes_[c] + row * kRow;
        Row value;
        for (int64_t i = 0; i < kRow; ++i) value[i] = between(in[i] * view_.gain[c], 0, 1) * 255;
        for (int64_t i = 0; i < kRow; ++i) {
          const int32_t at = static_cast<int32_t>(value[i]);
          value[i] = mixed(tone[at], tone[at + 1], value[i] - static_cast<float>(at));
        }
        for (int64_t i = 0; i < kRow; ++i) {
          const float chroma =
              grain(scramble(static_cast<uint32_t>(row * kRow + i) * 4 + static_cast<uint32_t>(c) + 1 + seed));
          value[i] = between(value[i] + view_.noise * (0.8f * luma[i] + 0.6f * chroma), 0, 1) * 255 + 0.5f;
        }
        for (int64_t i = 0; i < kRow; ++i)
          image[(row * kRow + i) * 3 + c] = static_cast<uint8_t>(static_cast<int32_t>(value[i]));
      }
    }
  }
};

enum Region { kSkin, kTop, kBottom, kShoes, kHair, kInner, kBag };

// What a dressed body shows at a place of the rest body.
inline Region region_at(float x, float y, float z, float along_arm, float along_leg, float on_arm, float on_head,
                        float on_foot, const Outfit& o) {
  const float side = magnitude(x);
  const bool arm = on_arm > 0.5f, head = on_head > 0.5f;
  if (o.strap > 0.5f && !arm && y < -0.06f && y > -0.45f && (z >= 0 || o.strap > 1.5f)) {
    const float slope = (y + 0.27f) * 0.6f;
    if (magnitude(o.strap < 1.5f ? side - 0.1f : o.strap < 2.5f ? x * 0.8f + slope : x * 0.8f - slope) < 0.02f)
      return kBag;
  }
  if (head && o.crown < 1 && (y > o.crown || (z < 0.02f && y > o.crown - 0.115f))) return kHair;
  if (o.tail > 0 && !arm && z < -0.02f && y < 0.05f && y > -o.tail && side < 0.11f) return kHair;
  if (on_foot > 0.5f || (!arm && along_leg > o.boot)) return kShoes;
  const bool trunk = !arm && !head && y < -0.06f && !(z > 0 && y > -0.06f - o.neck * (1 - side * 11));
  if (arm ? along_arm < o.sleeve : trunk && along_leg < o.hem) return !arm && z > 0 && side < o.open ? kInner : kTop;
  return trunk && along_leg < o.trouser ? kBottom : kSkin;
}

// How much of the second colour a material has at a place.
inline float pattern_at(const Material& m, float x, float y, float z) {
  const float duty = 0.25f + 0.4f * m.phase;
  const float across = fraction(x * m.scale + m.phase), down = fraction(y * m.scale + m.phase);
  const bool wide = magnitude(x) < m.scale, chest = y < -0.2f && y > -0.45f;
  switch (static_cast<int>(m.pattern)) {
    case 1: return down < duty ? 1.0f : 0.0f;                                      // stripes
    case 2: return across < duty ? 1.0f : 0.0f;                                    // columns
    case 3: return 0.5f * ((down < 0.3f ? 1.0f : 0.0f) + (across < 0.3f ? 1.0f : 0.0f));  // checks
    case 4: return y < -m.scale ? 1.0f : 0.0f;                                     // two blocks
    case 5: return wide && chest && z > 0 ? 1.0f : 0.0f;                           // panel on the chest
    case 6: return wide && chest && z < 0 ? 1.0f : 0.0f;                           // print on the back
    case 7: {                                                                      // dots
      const float u = across - 0.5f, v = down - 0.5f;
      return u * u + v * v < 0.07f ? 1.0f : 0.0f;
    }
    case 8: return noise(x * m.scale + 40 * m.phase, (y + z) * m.scale, 77) > 0.5f ? 1.0f : 0.0f;  // camouflage
    case 9: return magnitude(z + 0.02f) < m.scale ? 1.0f : 0.0f;                   // down the sides
    default: return 0;
  }
}

// Draw the person over what is painted: the pixels whose face is not -1. They are gathered first, so that the
// arithmetic is done for many at a time.
class Dresser {
  static constexpr int64_t kMost = 64;
  using Column = float[kMost];
  const Scene& scene_;
  const View& view_;
  const Outfit& outfit_;
  const Material* const materials_;
  const int64_t* const parts_;
  const float *const points_, *const verts_;
  const int64_t pixels_;
  float* const planes_;
  int64_t count_ = 0;
  int64_t pixel_[kMost], part_[kMost];
  // Of the three corners of each pixel's face: position in the image, in space, place on the body.
  Column centre_[2], point_[3][2], vert_[3][3], field_[3][kFields];

 public:
  Dresser(const Scene& s, int64_t b, const float* points, const float* verts, int64_t pixels, float* planes)
      : scene_(s),
        view_(s.view[b]),
        outfit_(s.outfit[b]),
        materials_(s.material + b * s.materials),
        parts_(s.part_material + b * s.parts),
        points_(points),
        verts_(verts),
        pixels_(pixels),
        planes_(planes) {}

  void add(int64_t pixel, int64_t face) {
    const int64_t i = count_;
    pixel_[i] = pixel;
    part_[i] = scene_.part[face];
    centre_[0][i] = static_cast<float>(static_cast<int32_t>(pixel % kRow)) + 0.5f;
    centre_[1][i] = static_cast<float>(static_cast<int32_t>(pixel / kRow)) + 0.5f;
    for (int k = 0; k < 3; ++k) {
      const int64_t at = scene_.faces[3 * face + k];
      for (int j = 0; j < 2; ++j) point_[k][j][i] = points_[3 * at + j];
      for (int j = 0; j < 3; ++j) vert_[k][j][i] = verts_[3 * at + j];
      for (int j = 0; j < kFields; ++j) field_[k][j][i] = scene_.fields[kFields * at + j];
    }
    if (++count_ == kMost) flush();
  }

  void flush() {
    Column place[kFields], light, folds, weave;
    const View w = view_;
    const float seed = outfit_.seed;
    const Outfit outfit = outfit_;
    const int64_t count = count_;
    for (int64_t i = 0; i < count; ++i) {
      const Corner a{point_[0][0][i], point_[0][1][i], 0}, b{point_[1][0][i], point_[1][1][i], 0};
      const Corner c{point_[2][0][i], point_[2][1][i], 0}, o{centre_[0][i], centre_[1][i], 0};
      const float inverse = 1 / signed_area(a, b, c);
      const float u = signed_area(o, b, c) * inverse, v = signed_area(o, c, a) * inverse;
      const float t = signed_area(o, a, b) * inverse;
      for (int k = 0; k < kFields; ++k) place[k][i] = u * field_[0][k][i] + v * field_[1][k][i] + t * field_[2][k][i];
    }
    for (int64_t i = 0; i < count; ++i) {
      const float ax = vert_[1][0][i] - vert_[0][0][i], bx = vert_[2][0][i] - vert_[0][0][i];
      const float ay = vert_[1][1][i] - vert_[0][1][i], by = vert_[2][1][i] - vert_[0][1][i];
      const float az = vert_[1][2][i] - vert_[0][2][i], bz = vert_[2][2][i] - vert_[0][2][i];
      const float nx = ay * bz - az * by, ny = az * bx - ax * bz, nz = ax * by - ay * bx;
      const float length = std::sqrt(nx * nx + ny * ny + nz * nz) + 1e-12f;
      const float facing = (nx * w.light[0] + ny * w.light[1] + nz * w.light[2]) / length;
      const float upward = (nx * w.up[0] + ny * w.up[1] + nz * w.up[2]) / length;
      light[i] = w.ambient * (0.75f + 0.25f * upward) + w.sun * (facing > 0 ? facing : 0.0f);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float x = place[0][i], y = place[1][i], z = place[2][i];
      folds[i] = noise(x * 11 + z * 5, y * 7 + seed, 5) + noise(x * 23 - z * 9, y * 19 + seed, 6) - 1;
      weave[i] = noise(x * 90 + z * 60, y * 90, 7) - 0.5f;
    }
    for (int64_t i = 0; i < count; ++i) {
      const auto body = [&] {
        return region_at(place[0][i], place[1][i], place[2][i], place[3][i], place[4][i], place[5][i], place[6][i],
                         place[7][i], outfit);
      };
      const int64_t which = part_[i] < 0 ? static_cast<int64_t>(body()) : parts_[part_[i]];
      const Material& m = materials_[which];
      const float bright = light[i] * (1 + m.rough * (folds[i] * 0.28f + weave[i] * 0.12f));
      const float share = pattern_at(m, place[0][i], place[1][i], place[2][i]);
      for (int k = 0; k < 3; ++k) planes_[k * pixels_ + pixel_[i]] = mixed(m.colour[k], m.second[k], share) * bright;
    }
    count_ = 0;
  }
};

// Pose the mesh of image b, stand it before the camera, and frame it: vertices in the camera's frame, their pixels and
// depths, and those of the shadow that they cast on the ground.
inline Frame stage(const Scene& s, int64_t b, float* verts, float* points, float* laid) {
  const View& view = s.view[b];
  const float *rest = s.rest + b * s.bare * 3, *transforms = s.transforms + b * s.joints * 12;
  for (int64_t v = 0; v < s.bare; ++v) {
    float blend[12] = {};
    for (int64_t k = 0; k < 4; ++k) {
      const float* t = transforms + 12 * s.joint[4 * v + k];
      for (int64_t i = 0; i < 12; ++i) blend[i] += s.weight[4 * v + k] * t[i];
    }
    const float x = rest[3 * v], y = rest[3 * v + 1], z = rest[3 * v + 2];
    for (int64_t i = 0; i < 3; ++i)
      verts[3 * v + i] = blend[4 * i] * x + blend[4 * i + 1] * y + blend[4 * i + 2] * z + blend[4 * i + 3];
  }
  const int64_t worn = (s.vertices - s.bare) * 3;
  std::copy_n(s.worn + b * worn, worn, verts + s.bare * 3);

  constexpr float far = std::numeric_limits<float>::infinity();
  float low = far, left = far, right = -far, top = far, bottom = -far;
  for (int64_t v = 0; v < s.vertices; ++v) {
    float* at = verts + 3 * v;
    const float level = at[0] * view.up[0] + at[1] * view.up[1] + at[2] * view.up[2];
    low = std::min(low, level);
    laid[3 * v] = level;  // for now
    at[2] += view.distance;
    points[3 * v] = at[0] / at[2];
    points[3 * v + 1] = at[1] / at[2];
    points[3 * v + 2] = at[2];
  }
  for (int64_t v = 0; v < s.framed; ++v) {
    left = std::min(left, points[3 * v]);
    right = std::max(right, points[3 * v]);
    top = std::min(top, points[3 * v + 1]);
    bottom = std::max(bottom, points[3 * v + 1]);
  }
  const float zoom = view.tall / (bottom - top);
  const Frame frame{zoom, view.column - (left + right) * 0.5f * zoom, view.row - (top + bottom) * 0.5f * zoom,
                    -(view.up[2] * view.distance + low)};
  const float steep = view.light[0] * view.up[0] + view.light[1] * view.up[1] + view.light[2] * view.up[2];
  for (int64_t v = 0; v < s.vertices; ++v) {
    const float* at = verts + 3 * v;
    float* shade = laid + 3 * v;
    points[3 * v] = points[3 * v] * zoom + frame.x0;
    points[3 * v + 1] = points[3 * v + 1] * zoom + frame.y0;
    const float along = (shade[0] - low) / steep, z = at[2] - along * view.light[2];
    shade[0] = (at[0] - along * view.light[0]) / z * zoom + frame.x0;
    shade[1] = (at[1] - along * view.light[1]) / z * zoom + frame.y0;
    shade[2] = z > 0.3f ? z : far;  // behind the camera: not drawn
  }
  return frame;
}

// Image b of the scenes.
inline void paint(const Scene& s, int64_t b, int64_t height, float* floats, int64_t* face, const Picture& picture) {
  const int64_t pixels = height * kRow;
  const View& view = s.view[b];
  float *verts = floats, *points = verts + 3 * s.vertices, *laid = points + 3 * s.vertices;
  float *planes = laid + 3 * s.vertices, *copy = planes + 3 * pixels, *depth = planes + 4 * pixels;
  const Frame frame = *picture.frame = stage(s, b, verts, points, laid);
  const auto draw = [&](const float* mesh) {
    std::fill_n(depth, pixels, std::numeric_limits<float>::infinity());
    std::fill_n(face, pixels, -1);
    rasterize(mesh, s.corners, s.face_count, height, kRow, depth, face);
  };

  const Painter painter(view, frame, height, planes);
  const Quad* quads = s.quad + b * s.quads;
  if (view.shadow > 0) draw(laid);
  painter.ground(face);
  painter.quads(quads, s.quads, false, nullptr);
  painter.blur(s.taps + b * 2 * kTaps, copy);
  draw(points);
  Dresser dresser(s, b, points, verts, pixels, planes);
  for (int64_t i = 0; i < pixels; ++i) {
    picture.mask[i] = picture.seen[i] = face[i] >= 0;
    picture.depth[i] = face[i] >= 0 ? depth[i] - view.distance : 0.0f;
    if (face[i] >= 0) dresser.add(i, face[i]);
  }
  dresser.flush();
  painter.quads(quads, s.quads, true, picture.seen);
  painter.blur(s.taps + (b * 2 + 1) * kTaps, copy);
  painter.develop(s.tone + b * 257, picture.image);
  std::fill_n(picture.shown, s.vertices, false);
  for (int64_t i = 0; i < pixels; ++i)
    if (picture.seen[i])
      for (int k = 0; k < 3; ++k) picture.shown[s.faces[3 * face[i] + k]] = true;
}

}  // namespace reid3d::REID3D_ISA
