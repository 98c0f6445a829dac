// swift-tools-version: 6.2
import PackageDescription

/// Settings of every target of our own: Swift 6 mode (the tools version's default), unsafe code marked,
/// and no warning left standing. `Lifetimes` lets views over bytes be checked by the compiler.
let own: [SwiftSetting] = [
  .strictMemorySafety(),
  .treatAllWarnings(as: .error),
  .enableExperimentalFeature("Lifetimes"),
]

let package = Package(
  name: "vnetr",
  products: [
    Product.executable(name: "vnetr", targets: ["vnetr"]),
    Product.library(name: "Datapath", targets: ["Datapath"]),
    Product.library(name: "SimulatedKernel", targets: ["SimulatedKernel"]),
    Product.library(name: "FuzzEntry", targets: ["FuzzEntry"]),
  ],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
    .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
  ],
  targets: [
    .systemLibrary(name: "CLinux", pkgConfig: "liburing", providers: [.apt(["liburing-dev"])]),
    .target(name: "Datapath", dependencies: ["CLinux"], swiftSettings: own),
    .target(name: "SimulatedKernel", dependencies: ["CLinux", "Datapath"], swiftSettings: own),
    .target(
      name: "Control",
      dependencies: [
        "CLinux", "Datapath",
        .product(name: "Logging", package: "swift-log"),
      ],
      swiftSettings: own),
    .executableTarget(
      name: "vnetr",
      dependencies: [
        "Control", "Datapath",
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
        .product(name: "Logging", package: "swift-log"),
      ],
      swiftSettings: own),
    .target(
      name: "FuzzEntry", dependencies: ["CLinux", "Control", "Datapath"], path: "Tests/Fuzz/Entry", swiftSettings: own),
    .target(name: "TestSupport", path: "Tests/Support", swiftSettings: own),
    .testTarget(
      name: "DatapathTests", dependencies: ["CLinux", "Datapath", "FuzzEntry", "TestSupport"], path: "Tests/Datapath",
      swiftSettings: own),
    .testTarget(
      name: "SimulatedKernelTests", dependencies: ["Datapath", "SimulatedKernel", "TestSupport"],
      path: "Tests/SimulatedKernel",
      swiftSettings: own),
    .testTarget(
      name: "ControlTests", dependencies: ["CLinux", "Control", "Datapath", "FuzzEntry", "TestSupport"],
      path: "Tests/Control",
      swiftSettings: own),
    .testTarget(
      name: "EndToEndTests",
      dependencies: ["CLinux", "Datapath", "TestSupport"],
      path: "Tests/EndToEnd", swiftSettings: own),
  ]
)
