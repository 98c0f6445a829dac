// swift-tools-version: 6.2
import PackageDescription

// The fuzzer, a package of its own: libFuzzer brings the main function, so that a plain build of these targets would
// not link. Use tools/fuzz, which builds all that they need with coverage and the address sanitizer too.

/// Each name is a folder in Targets, one in Corpus, and a function of FuzzEntry.
let names = ["frames", "checksum", "offload", "coalescing", "train", "virtqueue", "messages"]

let package = Package(
  name: "vnetr-fuzz",
  dependencies: [.package(name: "vnetr", path: "../..")],
  targets: names.map { name in
    .executableTarget(
      name: "fuzz-\(name)",
      dependencies: [.product(name: "FuzzEntry", package: "vnetr")],
      path: "Targets/\(name)",
      swiftSettings: [
        .strictMemorySafety(),
        .treatAllWarnings(as: .error),
        .enableExperimentalFeature("Lifetimes"),
        .unsafeFlags(["-parse-as-library", "-sanitize=address,fuzzer"]),
      ],
      linkerSettings: [.unsafeFlags(["-sanitize=address,fuzzer"])])
  }
)
