// swift-tools-version: 6.2
import PackageDescription

// Benchmarks, a package of its own so that nobody who builds the forwarder builds them. Use tools/bench.

let package = Package(
  name: "vnetr-benchmarks",
  dependencies: [.package(name: "vnetr", path: "..")],
  targets: [
    .target(name: "CBench"),
    .executableTarget(
      name: "bench",
      dependencies: ["CBench", .product(name: "Datapath", package: "vnetr")],
      swiftSettings: [
        .strictMemorySafety(),
        .treatAllWarnings(as: .error),
        .enableExperimentalFeature("Lifetimes"),
      ]),
  ]
)
